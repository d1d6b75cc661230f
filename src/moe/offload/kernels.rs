//! The kernels of `offload.cu`: which there are, and the launches of those that multiply, whose arguments are known here alone.
//! (Those of attention and the router are launched in one place each, in `offload/layers.rs`.)

use super::driver::Arg::{self, Long};
use super::driver::{Launch, THREADS, int};
use crate::moe::linear::Weight;
use crate::quant::Format;
use crate::quant::act::{ActKind, CHUNK};

/// The source.
pub(super) const SOURCE: &str = include_str!("../offload.cu");
/// Without these the results are not the CPU's.
pub(super) const OPTIONS: [&str; 2] = ["--fmad=false", "--std=c++17"];

/// Tokens of a matrix that go one by one, which reads its weights for each (from the device's cache after the first), are fewer
/// than this; more go tile by tile.
pub(super) const FEW: usize = 8;

/// Outputs of a block: rows of `expert_up`, `gemv` and `dense`; rows and tokens of `gemm`; chunks of `quantize`.
const ROWS: usize = 16;
const TILE: usize = 64;
const CHUNKS: usize = 4;

/// Formats that there are kernels for; matrices of others stay with the CPU.
pub(super) const FORMATS: [Format; 5] = [
    Format::Q4_0,
    Format::Q8_0,
    Format::Q4_K,
    Format::Q5_K,
    Format::Q6_K,
];

/// The names of all kernels.
pub(super) fn kernels() -> Vec<String> {
    let plain = [
        "quantize_32",
        "quantize_256",
        "silu_mul_all",
        "norm_rows",
        "rotate_heads",
        "score_keys",
        "attend_values",
        "route_tokens",
        "combine_rows",
    ];
    let by_format = ["expert_up", "gemv", "dense", "gemm"];
    let of = |kernel: &&str| FORMATS.map(|format| of_format(kernel, format));
    let all = by_format.iter().flat_map(of);
    plain.map(String::from).into_iter().chain(all).collect()
}

fn of_format(kernel: &str, format: Format) -> String {
    format!("{kernel}_{}", format.name())
}

/// `stopped` of offload.cu: where a pass says that it has stopped, and the layer, counted from 1, that goes on all the same.
#[derive(Clone, Copy)]
pub(super) struct Stop {
    /// 0: nothing stops it.
    pub(super) at: u64,
    /// 0: no layer does.
    pub(super) layer: usize,
}

impl Stop {
    /// Nothing stops it.
    pub(super) const NEVER: Stop = Stop { at: 0, layer: 0 };

    fn args(self) -> [Arg; 2] {
        [Long(self.at), int(self.layer)]
    }
}

/// Activations on the device, chunks `(k / 256, n_tok)`, of the kind that a matrix wants.
#[derive(Clone, Copy)]
pub(super) struct Activations {
    pub(super) at: u64,
    pub(super) n_tok: usize,
}

/// Rows of work on the device: `Row`s, one behind the other.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub(super) at: u64,
    pub(super) n: usize,
}

/// Tokens of activations.
#[derive(Clone, Copy)]
pub(super) struct Tokens {
    /// Where their numbers are; 0: those from `first` on.
    pub(super) pick: u64,
    pub(super) first: usize,
    pub(super) n: usize,
}

impl Tokens {
    /// Those from `first` on.
    pub(super) fn from(first: usize, n: usize) -> Tokens {
        let pick = 0;
        Tokens { pick, first, n }
    }
}

/// Makes activations `out` of `x (n, k)`.
pub(super) fn quantize(kind: ActKind, x: u64, n: usize, k: usize, out: u64, stop: Stop) -> Launch {
    let kernel = match kind {
        ActKind::Q8 => "quantize_32",
        _ => "quantize_256",
    };
    let args = [Long(x), Long(out), int(n), int(k)];
    let grid = [k.div_ceil(CHUNK).div_ceil(CHUNKS), n];
    Launch::new(kernel, grid, &[&args[..], &stop.args()].concat())
}

/// `inner (rows, d_ff) = silu(gate · x) · (up · x)`, token by token: of the experts of `rows`, whose gates and ups are like
/// `gate`.
pub(super) fn expert_up(
    gate: &Weight,
    rows: Rows,
    x: Activations,
    inner: u64,
    stop: Stop,
) -> Launch {
    by_rows("expert_up", gate, rows, x, inner, stop)
}

/// `y (rows, n_out) = w · x`, token by token: the `down` of each of `rows`, which are like `w`.
pub(super) fn gemv(w: &Weight, rows: Rows, x: Activations, y: u64, stop: Stop) -> Launch {
    by_rows("gemv", w, rows, x, y, stop)
}

fn by_rows(kernel: &str, w: &Weight, rows: Rows, x: Activations, y: u64, stop: Stop) -> Launch {
    let args = [
        Long(rows.at),
        Long(x.at),
        Long(y),
        int(x.n_tok),
        int(w.n_in),
        int(w.n_out),
    ];
    let grid = [w.n_out.div_ceil(ROWS), rows.n];
    let args = [&args[..], &stop.args()].concat();
    Launch::new(&of_format(kernel, w.format), grid, &args)
}

/// `y (n_tok, n_out) = w · x`, token by token: of the matrix like `w` at `at`.
pub(super) fn dense(w: &Weight, at: u64, x: Activations, y: u64, stop: u64) -> Launch {
    let args = [
        Long(at),
        Long(x.at),
        Long(y),
        int(x.n_tok),
        int(w.n_in),
        int(w.n_out),
        Long(stop),
    ];
    let grid = [w.n_out.div_ceil(ROWS), x.n_tok];
    Launch::new(&of_format("dense", w.format), grid, &args)
}

/// `y (tokens, n_out) = w · x`, tile by tile: of the matrix like `w` at `at`.
pub(super) fn gemm(w: &Weight, at: u64, x: Activations, tokens: Tokens, y: u64) -> Launch {
    let args = [
        Long(at),
        Long(x.at),
        Long(tokens.pick),
        int(tokens.first),
        Long(y),
        int(x.n_tok),
        int(tokens.n),
        int(w.n_out),
        int(w.n_in),
    ];
    let grid = [w.n_out.div_ceil(TILE), tokens.n.div_ceil(TILE)];
    Launch::new(&of_format("gemm", w.format), grid, &args)
}

/// `gate = silu(gate) · up`, both `(n)`.
pub(super) fn silu_mul(gate: u64, up: u64, n: usize) -> Launch {
    let grid = [n.div_ceil(8 * THREADS as usize), 1];
    Launch::new("silu_mul_all", grid, &[gate, up, n as u64].map(Long))
}
