//! The containers of weights: GGUF, and safetensors to read from.
//!
//! A GGUF file is a header (typed metadata, then one entry per tensor) followed by the tensors'
//! bytes. [`Gguf`] maps a file, checks its whole header once and leaves the weights where they are;
//! [`Writer`] makes such a file. The facts of the format are those of the GGUF specification
//! (`docs/gguf.md` in the ggml repository), versions 1 to 3.

mod bytes;
mod header;
mod identity;
pub mod imatrix;
mod mistaken;
pub mod reader;
pub mod safetensors;
pub mod source;
pub mod value;
pub mod writer;

pub use bytes::Bytes;
pub use identity::hex;
pub use imatrix::Imatrix;
pub use reader::Gguf;
pub use safetensors::Safetensors;
pub use source::Source;
pub use value::{Array, Kind, Value};
pub use writer::Writer;

use crate::quant::{self, Format};

/// The four bytes every GGUF file starts with.
pub(crate) const MAGIC: &[u8; 4] = b"GGUF";

/// Tensors start at multiples of this unless [`ALIGNMENT_KEY`] says otherwise.
pub(crate) const DEFAULT_ALIGNMENT: u64 = 32;

/// The metadata key that changes the alignment.
pub(crate) const ALIGNMENT_KEY: &str = "general.alignment";

/// Dimensions a tensor may have, by the specification.
pub(crate) const MAX_DIMS: usize = 4;

/// Bytes a metadata key may have, by the specification. Tensor names are held to it too, far above
/// the 64 bytes that the reference allows.
pub(crate) const MAX_NAME: usize = u16::MAX as usize;

/// A tensor's entry in a file: what it is and where its bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// The name, for example `blk.0.attn_q.weight`. Unique in the file.
    pub name: String,
    /// The GGUF tensor type; always one that [`quant::type_info`] knows.
    pub type_id: u32,
    /// Elements in each dimension, innermost first: 1 to 4 dimensions, none of them 0.
    pub shape: Vec<u64>,
    /// Which file of a split model holds the bytes, counted from 0.
    pub shard: usize,
    /// Where the bytes start, from the start of that file.
    pub offset: u64,
    /// How many bytes there are.
    pub bytes: u64,
}

impl Tensor {
    /// The weight format, if octet computes with it.
    pub fn format(&self) -> Option<Format> {
        Format::from_id(self.type_id)
    }

    /// The type's name in the field, for example `Q4_K`.
    pub fn type_name(&self) -> &'static str {
        quant::type_info(self.type_id).map_or("unknown", |t| t.name)
    }

    /// The number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().fold(1, |n, &d| n.saturating_mul(d))
    }
}

/// Why a type and a shape do not make a tensor.
#[derive(Debug)]
pub(crate) struct BadTensor {
    /// The part of the entry that is wrong.
    pub(crate) what: &'static str,
    pub(crate) expected: String,
    pub(crate) found: String,
}

/// Bytes of a tensor of this type and shape.
///
/// # Errors
/// An unknown type, no or more than four dimensions, a dimension of 0, a row that is no whole
/// number of blocks, or more than 2^63 - 1 elements or bytes.
pub(crate) fn tensor_bytes(type_id: u32, shape: &[u64]) -> Result<u64, BadTensor> {
    let bad = |what, expected: String, found: String| BadTensor {
        what,
        expected,
        found,
    };
    let info = quant::type_info(type_id).ok_or_else(|| {
        let expected = "a tensor type that octet knows".to_string();
        bad("type", expected, format!("id {type_id}"))
    })?;
    if shape.is_empty() || shape.len() > MAX_DIMS {
        let expected = format!("1 to {MAX_DIMS} dimensions");
        return Err(bad("shape", expected, shape.len().to_string()));
    }
    if shape.contains(&0) {
        let expected = "no dimension of 0".to_string();
        return Err(bad("shape", expected, format!("{shape:?}")));
    }
    if !shape[0].is_multiple_of(info.block_weights) {
        let expected = format!(
            "rows of a multiple of {} elements for {}",
            info.block_weights, info.name
        );
        return Err(bad("shape", expected, format!("{shape:?}")));
    }
    shape
        .iter()
        .try_fold(1u64, |n, &d| n.checked_mul(d))
        .filter(|&n| i64::try_from(n).is_ok())
        .and_then(|n| (n / info.block_weights).checked_mul(info.block_bytes))
        .filter(|&n| i64::try_from(n).is_ok())
        .ok_or_else(|| {
            let expected = "fewer than 2^63 elements and bytes".to_string();
            bad("shape", expected, format!("{shape:?}"))
        })
}

/// The smallest multiple of `alignment` that is not below `at`; `None` past the end of `u64`.
pub(crate) fn align_up(at: u64, alignment: u64) -> Option<u64> {
    at.checked_next_multiple_of(alignment)
}

/// Whether tensors may be aligned to this. The blocks of every format need at most 8 bytes, so that
/// with the specification's "multiple of 8" each tensor can be viewed as blocks in place.
pub(crate) fn valid_alignment(alignment: u64) -> bool {
    alignment.is_power_of_two() && alignment >= 8
}

/// A name from a file, short enough for an error line.
pub(crate) fn shown(name: &str) -> String {
    const CHARS: usize = 80;
    match name.char_indices().nth(CHARS) {
        Some((end, _)) => format!("`{}…` ({} bytes)", &name[..end], name.len()),
        None => format!("`{name}`"),
    }
}
