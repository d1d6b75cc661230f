//! The commands, one file each: their arguments and how they talk to the terminal.

pub mod batch;
pub mod bench;
pub mod chat;
pub mod completions;
pub mod detokenize;
mod folders;
mod gpu;
mod heatmap;
pub mod imatrix;
mod input;
pub mod inspect;
mod interrupt;
pub mod load;
mod machine;
pub mod man;
pub mod options;
pub mod perplexity;
pub mod plan;
pub mod profile;
mod progress;
pub mod report;
pub mod run;
mod score;
pub mod table;
pub mod tokenize;
