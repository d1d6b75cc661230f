//! The complete, boring tier: every weight format through its own definition in `quant/`, every
//! float helper as compiled for the baseline CPU.

use super::Tier;
use super::float::{Portable, float_doors};
use crate::quant::Format;

float_doors!(Portable);

fn matmul_quant(w: Rows<'_>, x: Tokens<'_>, y: &mut Stripe<'_>) {
    for (r, row) in w.bytes.chunks_exact(w.row_bytes()).enumerate() {
        for t in 0..x.len() {
            y.row(t)[r] = w.format.dot(row, x.token(t));
        }
    }
}

/// The table in which every slot is filled.
pub(super) fn table() -> Kernels {
    Kernels {
        tier: Tier::Scalar,
        matmul: [matmul_quant; Format::COUNT],
        quantize,
        rms_norm,
        add,
        add_scaled,
        silu_mul,
        rope,
        attend_f32,
        attend_f16,
    }
}

/// Nothing lies below this tier; its float formats take the vectorizable loops.
pub(super) fn install(k: &mut Kernels) {
    install_floats(k);
}
