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
        widen,
        widen_keys,
        widen_values,
        products,
    }
}

/// [`Kernels::products`], as it is defined.
fn products(w: &[u8], x: &[[i8; 4]; 16]) -> i32 {
    let mut sums = [0i32; 16];
    for w in w.as_chunks::<4>().0 {
        for (sum, x) in sums.iter_mut().zip(x) {
            for (w, x) in w.iter().zip(x) {
                *sum = sum.wrapping_add(i32::from(*w) * i32::from(*x));
            }
        }
    }
    sums.iter().fold(0, |total, sum| total.wrapping_add(*sum))
}

/// Nothing lies below this tier.
pub(super) fn install(k: &mut Kernels) {
    install_common(k);
}
