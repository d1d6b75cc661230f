//! `octet`: a quantized, CPU-first local runner for Mixtral, from GGUF files.
//!
//! # The layers
//!
//! Imports point only downward; `tests/layers.rs` holds this.
//!
//! | room | what it is for | may use |
//! |---|---|---|
//! | [`readable`] | sizes, and texts from outside, as people are shown them | |
//! | [`error`] | one error type: what, where, expected, found | `readable` |
//! | [`bounded`] | bounds for strangers' programs and documents | |
//! | [`disk`] | files that survive a crash, whole or not at all | `error` |
//! | [`near`] | what was probably meant: the nearest word, the nearest file | `disk` |
//! | [`cgroup`] | which control groups limit this process | |
//! | [`memory`] | how much memory there is, and how much is taken | `cgroup` |
//! | [`pool`] | how threads are made and woken, and on which cores | `error`, `cgroup` |
//! | [`quant`] | what the bytes of a weight mean: layout, decode, encode, exact dot products | |
//! | [`simd`] | faster ways to say what `quant` says, one file per CPU tier | `quant`, `pool` |
//! | [`gguf`] | the container of weights: read in place, written as a stream | `quant`, `error`, `bounded`, `disk`, `near` |
//! | [`moe`] | the Mixtral model: config, weights, attention, router, experts | all of these |
//! | [`chat`] | from people to tokens and back: tokenizer, prompts, sampler, sessions, REPL | `moe`, `gguf`, `disk`, `bounded`, `near`, `readable`, `error` |
//! | [`cli`] | one file per command: its arguments and how it talks to the terminal | everything |
//!
//! `tools/quantize/` makes the files that all this reads, from Hugging Face folders and other GGUFs.
//!
//! # Follow one token
//!
//! [`chat::repl`] reads a line; [`chat::template`] makes the turn; [`chat::tokenizer`] makes ids;
//! [`moe::forward`] runs them: embed; per layer norm, [`moe::attention`] over the cache in [`moe::kv`], norm,
//! [`moe::router`] picks 2 of 8, [`moe::experts`] gathers tokens per expert and asks [`moe::store`] where the bytes are,
//! [`moe::linear`] hands rows of the weights to [`simd`] on the [`pool`] ([`moe::offload`] some of it to a GPU); norm, head; [`chat::sampler`] picks an id;
//! [`chat::tokenizer`] streams text.
//!
//! # One answer
//!
//! The logits of a file and a sequence of tokens are the same bits on every CPU tier, for every number
//! of threads and every split into batches. [`quant`] says how; `simd/check.rs` and `tests/model.rs`
//! test it by equality.

pub mod bounded;
pub mod cgroup;
pub mod chat;
pub mod cli;
pub mod disk;
pub mod error;
pub mod gguf;
pub mod memory;
pub mod moe;
pub mod near;
pub mod pool;
pub mod quant;
pub mod readable;
pub mod simd;
