//! Programs for machines with a GPU, inside the worker so that one file is all there is to carry: `gpu-check` compares a GPU
//! with the CPU, `bench-gpu` measures. Where there is no GPU each says so in a line.

mod bench;
mod check;

pub use bench::{Settings, bench};
pub use check::check;

use anyhow::{Context, Result};
use configs::Plan;

use crate::hf::{Family, ModelConfig};

/// Why nothing can be done here, if nothing can: a line for the person.
fn absence(program: &str) -> Option<String> {
    let missing = !sharding::cuda::driver_is_there();
    missing.then(|| format!("{program}: SKIPPED: no CUDA driver here (libcuda.so.1 is not found); nothing was run"))
}

/// The plan of a recipe that is complete in itself; nothing of its data is read.
fn plan(recipe: &str) -> Result<Plan> {
    let file = std::env::temp_dir().join(format!("panglot-gpu-{}.yaml", std::process::id()));
    std::fs::write(&file, recipe).with_context(|| file.display().to_string())?;
    let plan = configs::load(&file, &[]);
    std::fs::remove_file(&file).with_context(|| file.display().to_string())?;
    Ok(plan?)
}

/// LLaMA 2 7B (Touvron et al. 2023, table 1) with MaLA-500's vocabulary, 260,164 pieces, padded to a multiple of 64.
pub(crate) fn llama_7b(layers: usize) -> ModelConfig {
    ModelConfig {
        vocab_size: 260_224,
        hidden_size: 4096,
        intermediate_size: 11_008,
        num_hidden_layers: layers,
        num_attention_heads: 32,
        num_key_value_heads: 32,
        head_dim: 128,
        norm_epsilon: 1e-5,
        max_position_embeddings: 4096,
        tie_word_embeddings: false,
        bos_token_id: Some(1),
        eos_token_id: vec![2],
        family: Family::Llama {
            rope_theta: 10_000.0,
            rope_scaling: None,
        },
    }
}
