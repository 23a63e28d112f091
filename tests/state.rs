//! State by name: readable, restorable, created when an option needs it, kept when it does not.

use rmsprop::{Config, RmsProp, StateKey};

const GRADS: [[f64; 3]; 4] = [
    [0.1, -2.0, 3.0],
    [0.5, 0.1, -1.0],
    [1.0, 1.0, 1.0],
    [-0.3, 0.2, 0.7],
];

#[test]
fn a_restored_optimizer_goes_on_bit_for_bit() {
    let config = Config {
        centered: true,
        momentum: 0.9,
        bias_correction: true,
        ema_decay: Some(0.9),
        ..Config::tf1()
    };
    let mut opt = RmsProp::<f64>::new(config.clone(), &[3]).unwrap();
    let mut p = [1.0; 3];
    GRADS[..2]
        .iter()
        .for_each(|g| opt.step(&mut [&mut p], &[g]).unwrap());
    let mut copy = RmsProp::<f64>::new(config, &[3]).unwrap();
    for key in StateKey::ALL {
        assert_eq!(StateKey::named(key.name()), Some(key));
        copy.state_mut(0, key)
            .unwrap()
            .copy_from_slice(opt.state(0, key).unwrap());
    }
    *copy.steps_mut(0).unwrap() = opt.steps(0).unwrap();
    let mut q = p;
    for g in &GRADS[2..] {
        opt.step(&mut [&mut p], &[g]).unwrap();
        copy.step(&mut [&mut q], &[g]).unwrap();
    }
    assert_eq!(p, q);
}

#[test]
fn options_switched_on_later_start_their_state_and_switched_off_keep_it() {
    let mut opt = RmsProp::<f64>::new(Config::default(), &[3]).unwrap();
    let mut p = [1.0; 3];
    opt.step(&mut [&mut p], &[&GRADS[0]]).unwrap();
    assert_eq!(opt.state(0, StateKey::MomentumBuffer), None);
    opt.set_config(
        0,
        Config {
            momentum: 0.5,
            ..Config::default()
        },
    )
    .unwrap();
    assert_eq!(opt.state(0, StateKey::MomentumBuffer), Some(&[0.0; 3][..]));
    opt.step(&mut [&mut p], &[&GRADS[1]]).unwrap();
    let kept = opt.state(0, StateKey::MomentumBuffer).unwrap().to_vec();
    opt.set_config(0, Config::default()).unwrap();
    opt.step(&mut [&mut p], &[&GRADS[2]]).unwrap();
    assert_eq!(opt.state(0, StateKey::MomentumBuffer), Some(&kept[..]));
}

#[test]
fn an_average_begins_as_the_parameter_before_its_first_update() {
    let config = Config {
        ema_decay: Some(1.0),
        ..Config::default()
    };
    let mut opt = RmsProp::<f64>::new(config, &[3, 3]).unwrap();
    let (mut p, mut q) = ([1.0; 3], [2.0; 3]);
    assert_eq!(opt.state(0, StateKey::Ema), None);
    opt.step_some(&mut [&mut p, &mut q], &[Some(&GRADS[0]), None])
        .unwrap();
    assert_ne!(p, [1.0; 3]);
    assert_eq!(opt.state(0, StateKey::Ema), Some(&[1.0; 3][..]));
    assert_eq!(opt.state(1, StateKey::Ema), None);
}

#[test]
fn corrected_decay_notes_the_first_lr() {
    let config = Config {
        lr: 0.1,
        weight_decay: 0.5,
        decoupled_weight_decay: true,
        corrected_weight_decay: true,
        ..Config::default()
    };
    let mut opt = RmsProp::<f64>::new(config, &[1]).unwrap();
    let mut p = [1.0];
    opt.set_lr(0.2).unwrap();
    opt.step(&mut [&mut p], &[&[0.0]]).unwrap();
    assert_eq!(opt.config(0).unwrap().initial_lr, Some(0.2));
    assert_eq!(p, [1.0 - 0.2 * 0.2 / 0.2 * 0.5]);
    opt.set_lr(0.1).unwrap();
    let before = p[0];
    opt.step(&mut [&mut p], &[&[0.0]]).unwrap();
    assert_eq!(p, [before - 0.1 * 0.1 / 0.2 * 0.5 * before]);
}

#[test]
fn groups_have_options_of_their_own_and_missing_gradients_leave_parameters_alone() {
    let mut opt = RmsProp::<f64>::new(
        Config {
            lr: 0.0,
            ..Config::default()
        },
        &[3],
    )
    .unwrap();
    opt.add_group(
        Config {
            lr: 0.1,
            initial_square_avg: 1.0,
            ..Config::default()
        },
        &[3, 3],
    )
    .unwrap();
    let (mut a, mut b, mut c) = ([1.0; 3], [1.0; 3], [1.0; 3]);
    opt.step_some(
        &mut [&mut a, &mut b, &mut c],
        &[Some(&GRADS[0]), None, Some(&GRADS[2])],
    )
    .unwrap();
    assert_eq!((a, b), ([1.0; 3], [1.0; 3]));
    assert!(c.iter().all(|&x| x < 1.0));
    assert_eq!([0, 1, 2].map(|i| opt.steps(i)), [Some(1), Some(0), Some(1)]);
    assert_eq!(opt.state(1, StateKey::SquareAvg), Some(&[1.0; 3][..]));
    opt.set_lr(0.5).unwrap();
    assert_eq!(opt.config(1).unwrap().lr, 0.5);
    assert!(opt.config(2).is_err());
}

#[test]
fn a_count_of_steps_does_not_wrap() {
    let config = Config {
        bias_correction: true,
        ..Config::default()
    };
    let mut opt = RmsProp::<f64>::new(config, &[3]).unwrap();
    *opt.steps_mut(0).unwrap() = u64::MAX;
    let mut p = [1.0; 3];
    opt.step(&mut [&mut p], &[&GRADS[0]]).unwrap();
    assert_eq!(opt.steps(0), Some(u64::MAX));
    assert!(p.iter().all(|p| p.is_finite()));
}
