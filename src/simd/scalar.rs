//! The complete, boring tier: every weight format through its own definition in `quant/`, every
//! float helper as compiled for the baseline CPU.

use super::Tier;
use super::float::float_doors;
use crate::quant::Format;
use crate::quant::float::LANES;

float_doors!([f32; LANES]);

/// The table in which every slot is filled.
pub(super) fn table() -> Kernels {
    Kernels {
        tier: Tier::Scalar,
        matmul: [matmul_defined; Format::COUNT],
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

/// Nothing lies below this tier.
pub(super) fn install(k: &mut Kernels) {
    install_common(k);
}
