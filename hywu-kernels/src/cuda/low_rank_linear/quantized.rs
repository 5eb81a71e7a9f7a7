//! Weights in eight bits: how their codes lie in device memory, and their kernels, those of quantized.cuh.

use super::{
    OP,
    product::{LARGE_TILES, Operand, Over, Product},
    rows::Rows,
};
use crate::{
    Error, Result, Tensor,
    cuda::{Call, Gpu, View, blocks},
    ops::low_rank_linear::{Format, QuantizedWeight},
};
use hywu_core::Dtype;

/// Codes of a row come in groups: what a tensor core's lanes hold of 16 of k.
const GROUP: usize = 16;

/// Codes in device memory. Rows are whole groups, with zeros at the end; in a group four bytes are for one lane, which
/// gets codes 2 t, 2 t + 1, 2 t + 8 and 2 t + 9.
#[derive(Clone)]
pub(crate) struct Packed(View);

/// The code at byte `i` of a group.
fn code_at(i: usize) -> usize {
    2 * (i / 4) + i % 2 + 8 * (i / 2 % 2)
}

fn pack(codes: &[u8], inner: usize) -> Vec<u8> {
    let pitch = inner.next_multiple_of(GROUP);
    let mut packed = vec![0; codes.len() / inner * pitch];
    for (to, row) in packed.chunks_mut(pitch).zip(codes.chunks(inner)) {
        for (to, group) in to.chunks_mut(GROUP).zip(row.chunks(GROUP)) {
            to.iter_mut().enumerate().for_each(|(i, to)| *to = group.get(code_at(i)).copied().unwrap_or(0));
        }
    }
    packed
}

fn unpack(packed: &[u8], inner: usize) -> Vec<u8> {
    let pitch = inner.next_multiple_of(GROUP);
    let mut codes = vec![0; packed.len() / pitch * inner];
    for (from, row) in packed.chunks(pitch).zip(codes.chunks_mut(inner)) {
        for (from, group) in from.chunks(GROUP).zip(row.chunks_mut(GROUP)) {
            for (i, &from) in from.iter().enumerate() {
                if let Some(to) = group.get_mut(code_at(i)) {
                    *to = from;
                }
            }
        }
    }
    codes
}

impl Packed {
    /// Codes of rows of `inner`, to device number `ordinal`.
    ///
    /// # Errors
    /// A device that can't be used, or has not enough memory.
    pub fn upload(ordinal: usize, codes: &[u8], inner: usize) -> Result<Self> {
        let packed = pack(codes, inner);
        // Any four bytes; the dtype counts them.
        let view = View::new(Gpu::get(ordinal)?, packed.len() / 4, Dtype::F32)?;
        view.gpu().upload(&view.memory, view.start(), &packed)?;
        Ok(Self(view))
    }
    /// The codes that [`Packed::upload`] took.
    ///
    /// # Errors
    /// Those of the device.
    pub fn download(&self, inner: usize) -> Result<Vec<u8>> {
        let mut packed = vec![0; self.bytes()];
        self.0.gpu().download(&self.0.memory, self.0.start(), &mut packed)?;
        Ok(unpack(&packed, inner))
    }
    /// Memory that they take.
    pub fn bytes(&self) -> usize {
        self.0.bytes()
    }
}

/// The name that kernels have for a format.
fn name(format: Format) -> &'static str {
    match format {
        Format::Int8 => "int8",
        Format::Fp8 => "fp8",
    }
}

/// scale * code, rounded to `dtype`.
///
/// # Errors
/// A weight on the host; not enough memory on its device.
pub(crate) fn dequantize(weight: &QuantizedWeight, dtype: Dtype) -> Result<Tensor> {
    let out = weight.scales().empty_as(weight.shape(), dtype)?;
    let (inner, rows) = (out.dim_back(1), weight.scales().numel());
    let groups = rows * inner.div_ceil(GROUP);
    let call = Call::new(OP, &format!("dequantize_{}", name(weight.format())), &out)?;
    let call = call.memory(&weight.packed()?.0).tensor_as(weight.scales(), Dtype::F32)?.tensor(&out)?;
    call.size(inner)?.size(groups)?.over(groups, 1)?;
    Ok(out)
}

/// The shapes of tiles, as in quantized.cuh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    name: &'static str,
    height: usize,
    width: usize,
    threads: u32,
    /// Dynamic shared memory: stages of x and of lora_b, in lines of `depth` and 8 elements.
    shared: usize,
}

const fn shape(name: &'static str, [height, width, depth, stages]: [usize; 4], threads: u32) -> Shape {
    Shape { name, height, width, threads, shared: stages * (height + width) * (depth + 8) * 2 }
}

const MANY: Shape = shape("many", [128, 128, 32, 3], 256);
const FEW: Shape = shape("few", [64, 32, 64, 8], 128);

/// For so many rows, and columns in so many parts.
fn plan(rows: usize, part: usize, parts: usize) -> Shape {
    let tiles = rows.div_ceil(MANY.height).saturating_mul(part.div_ceil(MANY.width)).saturating_mul(parts);
    match rows > FEW.height && part > FEW.width && tiles >= LARGE_TILES {
        true => MANY,
        false => FEW,
    }
}

impl<'a> Operand<'a> {
    /// The codes of a weight; the tensor is that of its scales.
    pub fn codes(weight: &'a QuantizedWeight) -> Self {
        let [outer, inner] = super::matrix(weight.shape());
        let pitch = inner.next_multiple_of(GROUP);
        Self { tensor: weight.scales(), stride: outer * pitch, part: 0, pitch, banded: false }
    }
}

/// A product over the rows of a bf16 x whose B are the [`Operand::codes`] of `weight`, into `shape`.
pub(super) fn expand(product: &Product<'_>, weight: &QuantizedWeight, shape: &[usize]) -> Result<Tensor> {
    let (x, Over::Rows { segments, rows, adapters }) = (product.a.tensor, &product.over) else {
        return Err(Error::invalid(OP, "a weight in eight bits serves rows only"));
    };
    let part = product.dims[1];
    let plan = plan(*rows, part, product.parts);
    let tiles = Rows::new(x, *segments, *rows, *adapters, plan.height)?;
    let out = x.empty_like(shape)?;
    let (low_rank, kernel) =
        (product.low_rank.as_ref(), format!("quantized_{}_{}", name(weight.format()), plan.name));
    let call = Call::new(OP, &kernel, x)?.tensor(x)?.memory(&weight.packed()?.0);
    let call = call.tensor_as(weight.scales(), Dtype::F32)?;
    let call = call.optional(low_rank.map(|l| l.0.tensor))?.optional(low_rank.map(|l| l.1.tensor))?;
    let call = call.tensor(&out)?.optional(product.bias)?.bytes(&product.sizes(0, &tiles, out.numel())?);
    let columns = product.parts * part.div_ceil(plan.width);
    call.launch([blocks(tiles.count.saturating_mul(columns), 1)?, 1, 1], plan.threads, plan.shared)?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_rows_get_narrow_tiles() {
        assert_eq!(plan(4096, 4096, 1), MANY);
        assert_eq!(plan(4096, 1536, 2), MANY);
        assert_eq!(plan(16, 4096, 1), FEW);
        assert_eq!(plan(65, 1_000_000, 1), MANY);
        assert_eq!(plan(256, 4096, 1), FEW);
        assert_eq!(plan(1_000_000, 17, 2), FEW);
        // What an sm_80 has, and twice of MANY, or once of FEW.
        assert_eq!((MANY.shared, FEW.shared), (61_440, 110_592));
    }

    #[test]
    fn a_lane_finds_its_codes_side_by_side() {
        let codes: Vec<u8> = (0..32).collect();
        let packed = pack(&codes, 16);
        assert_eq!(packed[..8], [0, 1, 8, 9, 2, 3, 10, 11]);
        assert_eq!(packed[28..], [16 + 6, 16 + 7, 16 + 14, 16 + 15]);
    }

    #[test]
    fn packing_pads_rows_and_loses_nothing() {
        for inner in [1, 2, 9, 15, 16, 17, 33, 64] {
            let codes: Vec<u8> = (1..=3 * inner as u8).collect();
            let packed = pack(&codes, inner);
            assert_eq!(packed.len(), 3 * inner.next_multiple_of(16));
            assert_eq!(packed.iter().filter(|code| **code == 0).count(), packed.len() - codes.len());
            assert_eq!(unpack(&packed, inner), codes);
        }
    }
}
