//! Every framework's RMSprop by name: the one table.

use crate::config::Config;
use crate::error::Error;

/// Builds a constructor of [`Config`] per row, and [`Config::dialect`] and [`DIALECTS`] over all of
/// them.
macro_rules! dialects {
    ($($(#[$doc:meta])* $name:ident: $alpha:literal, $eps:literal, $eps_in_sqrt:literal, $initial:literal,
        $momentum:literal, $centered:literal, $lr_in_momentum:literal, $decoupled:literal;)*) => {
        /// The names [`Config::dialect`] knows.
        pub const DIALECTS: &[&str] = &[$(stringify!($name)),*];

        /// The dialects. Their `lr` is 1e-3, for want of one: it is yours to choose.
        impl Config {
            $($(#[$doc])*
            pub const fn $name() -> Config {
                Config {
                    lr: 1e-3,
                    alpha: $alpha,
                    eps: $eps,
                    weight_decay: 0.0,
                    momentum: $momentum,
                    centered: $centered,
                    eps_in_sqrt: $eps_in_sqrt,
                    initial_square_avg: $initial,
                    lr_in_momentum: $lr_in_momentum,
                    nesterov: false,
                    bias_correction: false,
                    decoupled_weight_decay: $decoupled,
                    cautious_weight_decay: false,
                    corrected_weight_decay: false,
                    initial_lr: None,
                    clip_weights: None,
                    ema_decay: None,
                    maximize: false,
                }
            })*

            /// The dialect of that name, one of [`DIALECTS`].
            ///
            /// # Errors
            /// [`Error::Dialect`] for any other, which lists them.
            ///
            /// ```
            /// assert_eq!(rmsprop::Config::dialect("tf1"), Ok(rmsprop::Config::tf1()));
            /// ```
            pub fn dialect(name: &str) -> Result<Config, Error> {
                match name {
                    $(stringify!($name) => Ok(Config::$name()),)*
                    _ => Err(Error::Dialect { found: name.to_owned() }),
                }
            }
        }
    };
}

dialects! {
    //       alpha, eps, eps in sqrt, initial v, momentum, centered, lr in buffer, decoupled decay
    /// OneFlow 1.0 `oneflow.optim.RMSprop`; there without momentum.
    oneflow: 0.99, 1e-8, true, 0.0, 0.0, false, true, false;
    /// PyTorch 2 `torch.optim.RMSprop`.
    torch: 0.99, 1e-8, false, 0.0, 0.0, false, false, false;
    /// timm 1 `timm.optim.RMSpropTF`.
    timm: 0.9, 1e-10, true, 1.0, 0.0, false, true, false;
    /// Stable-Baselines3 2 `RMSpropTFLike`.
    sb3: 0.99, 1e-8, true, 1.0, 0.0, false, false, false;
    /// Keras 3 `keras.optimizers.RMSprop`.
    keras: 0.9, 1e-7, true, 0.0, 0.0, false, true, true;
    /// TensorFlow 1 `tf.compat.v1.train.RMSPropOptimizer`.
    tf1: 0.9, 1e-10, true, 1.0, 0.0, false, true, false;
    /// Optax 0.2 `optax.rmsprop`.
    optax: 0.9, 1e-8, true, 0.0, 0.0, false, true, false;
    /// PaddlePaddle 3 `paddle.optimizer.RMSProp`.
    paddle: 0.95, 1e-6, true, 0.0, 0.0, false, true, false;
    /// MLX `mlx.optimizers.RMSprop`.
    mlx: 0.99, 1e-8, false, 0.0, 0.0, false, false, false;
    /// Graves 2013, arXiv:1308.0850, equations 38 to 45; Chainer's `RMSpropGraves`.
    graves: 0.95, 1e-4, true, 0.0, 0.9, true, true, false;
    /// MindSpore 2 `mindspore.nn.RMSProp`, as documented.
    mindspore: 0.9, 1e-10, true, 1.0, 0.0, false, true, false;
    /// Chainer 7 `chainer.optimizers.RMSprop`.
    chainer: 0.99, 1e-8, false, 0.0, 0.0, false, false, false;
    /// burn 0.22 `burn::optim::RmsProp`.
    burn: 0.99, 1e-5, false, 0.0, 0.9, false, false, false;
    /// dfdx `dfdx::nn::optim::RMSprop`.
    dfdx: 0.9, 1e-8, true, 1.0, 0.0, false, false, false;
    /// Mnih et al. 2015 (DQN), as DeepMind's own code computes it: the "gradient momentum" 0.95 is
    /// the decay of `grad_avg`. There lr is 2.5e-4.
    dqn: 0.95, 1e-2, true, 0.0, 0.0, true, true, false;
}
