//! The commands, one file each: their arguments and how they talk to the terminal.

pub mod batch;
pub mod bench;
pub mod chat;
pub mod completions;
pub mod detokenize;
pub mod gpu;
pub mod heatmap;
pub mod imatrix;
pub mod input;
pub mod inspect;
pub mod journal;
pub mod load;
pub mod man;
pub mod options;
pub mod perplexity;
pub mod plan;
pub mod profile;
pub mod report;
pub mod run;
pub mod score;
pub mod table;
pub mod tokenize;
