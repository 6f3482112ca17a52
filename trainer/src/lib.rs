//! Model, step, checkpoint, evaluation and export. Begin with [`step`].

pub mod batch;
pub mod checkpoint;
pub mod doctor;
pub mod during;
pub mod evaluate;
pub mod export;
pub mod fewshot;
pub mod generate;
pub mod gguf;
pub mod gpu;
pub mod guard;
pub mod hf;
pub mod inspect;
pub mod measure;
pub mod memory;
pub mod model;
pub mod parts;
pub mod planned;
pub mod random;
pub mod scratch;
pub mod step;
pub mod subject;
pub mod tensorboard;
pub mod timeline;
pub mod train;
pub mod watched;
