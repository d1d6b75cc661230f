//! The commands, one file each: their arguments and how they talk to the terminal.

pub mod batch;
pub mod bench;
pub mod chat;
pub mod completions;
pub mod detokenize;
pub mod folders;
pub mod gpu;
pub mod heatmap;
pub mod imatrix;
pub mod input;
pub mod inspect;
pub mod interrupt;
pub mod load;
pub mod machine;
pub mod man;
pub mod options;
pub mod perplexity;
pub mod plan;
pub mod profile;
pub mod progress;
pub mod report;
pub mod run;
pub mod score;
pub mod table;
pub mod tokenize;
