//! All inputs are checked before the first write: an error leaves everything as it was.

use rmsprop::{Config, Error, Isa, Nonfinite, RmsProp, StateKey};

fn optimizer() -> RmsProp<f32> {
    RmsProp::new(Config::default(), &[2, 3]).unwrap()
}

#[test]
fn options_out_of_range_are_refused_by_name() {
    let good = Config::default();
    let bad = [
        (
            "lr",
            Config {
                lr: -1.0,
                ..good.clone()
            },
        ),
        (
            "lr",
            Config {
                lr: f64::NAN,
                ..good.clone()
            },
        ),
        (
            "alpha",
            Config {
                alpha: 1.5,
                ..good.clone()
            },
        ),
        (
            "alpha",
            Config {
                alpha: 1.0,
                bias_correction: true,
                ..good.clone()
            },
        ),
        (
            "eps",
            Config {
                eps: f64::INFINITY,
                ..good.clone()
            },
        ),
        (
            "weight_decay",
            Config {
                weight_decay: -0.1,
                ..good.clone()
            },
        ),
        (
            "momentum",
            Config {
                momentum: -0.1,
                ..good.clone()
            },
        ),
        (
            "initial_square_avg",
            Config {
                initial_square_avg: -1.0,
                ..good
            },
        ),
    ];
    for (wanted, config) in bad {
        let mut opt = optimizer();
        let before = opt.config(0).unwrap().clone();
        for error in [
            RmsProp::<f64>::new(config.clone(), &[1]).unwrap_err(),
            opt.set_config(0, config).unwrap_err(),
        ] {
            assert!(
                matches!(error, Error::Hyperparameter { key, .. } if key == wanted),
                "{error}"
            );
            assert!(error.to_string().starts_with(wanted), "{error}");
        }
        assert_eq!(opt.config(0).unwrap(), &before);
    }
    assert!(optimizer().with_max_grad_norm(0.0).is_err());
    assert!(optimizer().with_max_grad_norm(f64::NAN).is_err());
    assert!(matches!(
        optimizer().with_threads(0),
        Err(Error::Threads { .. })
    ));
    assert_eq!(
        RmsProp::<f32>::new(Config::default(), &[]).unwrap_err(),
        Error::NoParameters
    );
    assert_eq!(
        RmsProp::<f32>::new(Config::default(), &[usize::MAX, 2]).unwrap_err(),
        Error::TooLarge
    );
    for elements in [usize::MAX / 2, 1 << 50] {
        let error = RmsProp::<f32>::new(Config::default(), &[elements]).unwrap_err();
        assert_eq!(error, Error::OutOfMemory { elements });
    }
    assert!(matches!(Isa::named("mmx"), Err(Error::Isa { .. })));
}

#[test]
fn an_instruction_set_that_is_not_there_is_named_and_no_variable_is() {
    let absent = [Isa::Avx2, Isa::Avx512]
        .into_iter()
        .filter(|isa| !isa.is_available())
        .map(|isa| (isa.name(), optimizer().with_isa(isa).unwrap_err()));
    for (name, error) in absent.chain([("mmx", Isa::named("mmx").unwrap_err())]) {
        let text = error.to_string();
        assert!(text.contains(&format!("'{name}'")), "{text}");
        assert!(
            text.contains("scalar") && !text.contains("RMSPROP_ISA"),
            "{text}"
        );
    }
}

#[test]
fn shapes_that_do_not_match_change_nothing() {
    let (mut a, mut b) = ([1.0f32; 2], [1.0f32; 3]);
    let mut opt = optimizer();
    opt.step(
        &mut [&mut a[..], &mut b[..]],
        &[&[1.0; 2][..], &[1.0; 3][..]],
    )
    .unwrap();
    let (before, state) = ((a, b), opt.state(1, StateKey::SquareAvg).unwrap().to_vec());
    let count = opt.step(&mut [&mut a[..]], &[&[1.0; 2][..]]).unwrap_err();
    assert_eq!(count.to_string(), "expected 2 parameters, got 1");
    let length = opt
        .step(
            &mut [&mut a[..], &mut b[..]],
            &[&[1.0; 2][..], &[1.0; 2][..]],
        )
        .unwrap_err();
    assert_eq!(length.to_string(), "gradient 1: expected 3 elements, got 2");
    assert_eq!((a, b), before);
    assert_eq!(opt.state(1, StateKey::SquareAvg).unwrap(), state);
    assert_eq!(opt.steps(1), Some(1));
    assert_eq!(
        (opt.steps(2), opt.state(2, StateKey::SquareAvg)),
        (None, None)
    );
}

#[test]
fn a_gradient_that_is_not_finite_is_computed_with_skipped_or_refused() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let grads = [&[0.5, 0.5][..], &[0.5, 0.5, bad][..]];
        let run = |nonfinite| {
            let (mut a, mut b) = ([1.0f32; 2], [1.0f32; 3]);
            let mut opt = optimizer().with_nonfinite(nonfinite);
            let result = opt.step(&mut [&mut a[..], &mut b[..]], &grads);
            (
                result,
                a,
                opt.state(0, StateKey::SquareAvg).unwrap()[0],
                opt.steps(0).unwrap(),
                opt.skipped_steps(),
            )
        };
        let (result, a, v, steps, skipped) = run(Nonfinite::Propagate);
        assert!(result.is_ok() && a[0] < 1.0 && v > 0.0 && (steps, skipped) == (1, 0));
        let (result, a, v, steps, skipped) = run(Nonfinite::Skip);
        assert!(result.is_ok() && a == [1.0; 2] && v == 0.0 && (steps, skipped) == (0, 1));
        let (result, a, v, steps, skipped) = run(Nonfinite::Raise);
        let error = result.unwrap_err();
        assert!(
            matches!(
                error,
                Error::Nonfinite {
                    index: 1,
                    element: 2,
                    ..
                }
            ),
            "{error}"
        );
        assert!(a == [1.0; 2] && v == 0.0 && (steps, skipped) == (0, 0));
    }
}

#[test]
fn a_norm_that_overflows_is_not_a_gradient_that_does() {
    let mut opt = RmsProp::<f64>::new(Config::default(), &[1])
        .unwrap()
        .with_nonfinite(Nonfinite::Raise);
    opt.step(&mut [&mut [1.0][..]], &[&[1e300][..]]).unwrap();
    assert_eq!(opt.steps(0), Some(1));
}

#[test]
fn unknown_dialects_are_told_the_known_ones() {
    let refused = Config::dialect("adam").unwrap_err();
    assert_eq!(
        refused,
        Error::Dialect {
            found: "adam".to_owned()
        }
    );
    let message = refused.to_string();
    for name in rmsprop::DIALECTS {
        assert!(message.contains(name), "{message}");
        assert!(Config::dialect(name).is_ok());
    }
}

#[test]
fn setters_take_what_the_constructors_take() {
    let mut opt = optimizer();
    assert!(matches!(opt.set_threads(0), Err(Error::Threads { .. })));
    assert!(matches!(
        opt.set_max_grad_norm(Some(0.0)),
        Err(Error::Hyperparameter { .. })
    ));
    let (mut a, mut b) = ([1.0; 2], [1.0; 3]);
    let grads: [&[f32]; 2] = [&[3.0, 0.0], &[0.0, 0.0, 4.0]];
    opt.set_threads(1).unwrap();
    opt.set_max_grad_norm(Some(1.0)).unwrap();
    opt.step(&mut [&mut a[..], &mut b[..]], &grads).unwrap();
    assert_eq!(opt.last_grad_norm(), Some(5.0));
    opt.set_max_grad_norm(None).unwrap();
    opt.set_nonfinite(Nonfinite::Raise);
    let bad: [&[f32]; 2] = [&[f32::NAN, 0.0], &[0.0; 3]];
    let before = (a, b);
    let refused = opt.step(&mut [&mut a[..], &mut b[..]], &bad);
    assert!(matches!(refused, Err(Error::Nonfinite { .. })));
    assert_eq!((a, b), before);
}
