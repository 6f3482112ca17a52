//! The one door to Hugging Face's folder layout: config.json, safetensors, and folders that appear whole or not at all.

pub mod config;
pub mod folder;
pub mod weights;

pub use config::{Family, ModelConfig, RopeScaling, Start};
pub use folder::NewFolder;
pub use weights::{SHARD_BYTES, Weights, write_folder, write_weights};
