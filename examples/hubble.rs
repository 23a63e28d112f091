//! Fits a model kept in a `Vec<f32>` through the crate: `cargo run --release --example hubble`.
//!
//! Hubble's 24 nebulae (PNAS 15, 1929): velocity = slope * distance + intercept. The line of least
//! squares is known, so one can see the optimizer arrive.

use rmsprop::{Config, Error, RmsProp};

/// Megaparsecs.
const DISTANCE: [f32; 24] = [
    0.032, 0.034, 0.214, 0.263, 0.275, 0.275, 0.45, 0.5, 0.5, 0.63, 0.8, 0.9, 0.9, 0.9, 0.9, 1.0,
    1.1, 1.1, 1.4, 1.7, 2.0, 2.0, 2.0, 2.0,
];

/// Hundreds of kilometres per second.
const VELOCITY: [f32; 24] = [
    1.7, 2.9, -1.3, -0.7, -1.85, -2.2, 2.0, 2.9, 2.7, 2.0, 3.0, -0.3, 6.5, 1.5, 5.0, 9.2, 4.5, 5.0,
    5.0, 9.6, 5.0, 8.5, 8.0, 10.9,
];

fn main() -> Result<(), Error> {
    let mut model = vec![0.0f32; 2]; // slope, intercept
    let mut opt = RmsProp::new(
        Config {
            lr: 0.05,
            ..Config::tf1()
        },
        &[model.len()],
    )?;
    for epoch in 1..=1000 {
        let (loss, grad) = loss_and_gradient(&model);
        opt.step(&mut [&mut model], &[&grad])?;
        opt.set_lr(0.05 / (1.0 + epoch as f64 / 50.0))?;
        if epoch % 200 == 0 {
            println!(
                "epoch {epoch:4}  loss {loss:.4}  slope {:.3}  intercept {:.3}",
                model[0], model[1]
            );
        }
    }
    let (slope, intercept) = least_squares();
    println!("least squares            slope {slope:.3}  intercept {intercept:.3}");
    let error = (model[0] - slope).abs().max((model[1] - intercept).abs());
    assert!(error < 0.01, "the optimizer arrived {error} away");
    Ok(())
}

/// The mean squared error and its gradient.
fn loss_and_gradient(model: &[f32]) -> (f32, [f32; 2]) {
    let mut sums = (0.0, [0.0; 2]);
    for (x, y) in DISTANCE.iter().zip(VELOCITY) {
        let error = model[0] * x + model[1] - y;
        sums.0 += error * error / 24.0;
        sums.1[0] += 2.0 * error * x / 24.0;
        sums.1[1] += 2.0 * error / 24.0;
    }
    sums
}

/// The minimum in closed form.
fn least_squares() -> (f32, f32) {
    let mean = |values: &[f32]| values.iter().sum::<f32>() / values.len() as f32;
    let (x_mean, y_mean) = (mean(&DISTANCE), mean(&VELOCITY));
    let products = DISTANCE
        .iter()
        .zip(VELOCITY)
        .map(|(x, y)| (x - x_mean) * (y - y_mean));
    let squares = DISTANCE.iter().map(|x| (x - x_mean) * (x - x_mean));
    let slope = products.sum::<f32>() / squares.sum::<f32>();
    (slope, y_mean - slope * x_mean)
}
