//! Tensor maps: what the copy engine of Hopper (TMA) is told about a tensor and the boxes that it moves.

use super::{Gpu, check};
use crate::{Result, cuda::call::Boxes};
use cudarc::driver::sys;

impl Gpu {
    /// A map of bf16 elements with the 128-byte swizzle, as the bytes of the kernel's `CUtensorMap` argument.
    pub fn tensor_map(&self, boxes: &Boxes) -> Result<[u64; 16]> {
        let mut map = sys::CUtensorMap_st { opaque: [0; 16] };
        let rank = boxes.dims.len() as u32;
        let steps = [1; 5];
        // SAFETY: every array has `rank` elements or more, the strides one less; the map outlives the call. Nothing is read at the address.
        let done = unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut map,
                sys::CUtensorMapDataType_enum::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                rank,
                boxes.address as *mut _,
                boxes.dims.as_ptr(),
                boxes.pitches.as_ptr(),
                boxes.size.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave_enum::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle_enum::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion_enum::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill_enum::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        let what = || format!("cuTensorMapEncodeTiled for boxes {:?} of {:?}", boxes.size, boxes.dims);
        check(what, done.result())?;
        Ok(map.opaque)
    }
}
