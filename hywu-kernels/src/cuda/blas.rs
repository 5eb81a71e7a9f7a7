//! Products of bf16 matrices by cuBLASLt, where that library is installed: it is loaded at run time, and nothing needs it.
//!
//! It chooses an algorithm by the sizes, the number of rows among them, so a row's bits may depend on how many other rows there are.
//! A forward pass must not show that, hence `Use` in low_rank_linear. For given sizes the algorithm is chosen once in a process; two runs
//! are equal where the library chooses the same, HYWU_CUDA_BLAS=0 is for those who want to be sure.

use super::{
    Gpu, Memory,
    call::on_gpu,
    driver::{in_replay, lock},
    low_rank_linear::Layout,
};
use crate::{Error, Result, Tensor};
use cudarc::cublaslt::{
    result::{self, CublasError},
    sys,
};
use std::{
    collections::{HashMap, hash_map::Entry},
    ffi::c_void,
    sync::Mutex,
};

/// Device memory that its algorithms may use.
const WORKSPACE: usize = 32 << 20;
/// Every operand starts at a multiple of so many bytes.
const ALIGNMENT: u32 = 16;
const OP: &str = "low_rank_linear";

/// A product of row-major matrices, of m, n and k; has it a bias?
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    layout: Layout,
    dims: [usize; 3],
    bias: bool,
}

/// The library on one device.
pub(super) struct Blas {
    gpu: &'static Gpu,
    handle: sys::cublasLtHandle_t,
    workspace: Memory,
    /// None for a shape that it can't do.
    plans: Mutex<HashMap<Shape, Option<Plan>>>,
}

/// Descriptors and the algorithm for one shape; they live as long as the process.
struct Plan {
    product: sys::cublasLtMatmulDesc_t,
    a: sys::cublasLtMatrixLayout_t,
    b: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

// SAFETY: the handle may be used from any thread; descriptors are used under the mutex only.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

fn check<T>(call: impl FnOnce() -> String, result: Result<T, CublasError>) -> Result<T> {
    result.map_err(|e| Error::Cuda {
        call: call(),
        code: e.0 as u32,
        name: format!("{:?}", e.0),
        message: "cuBLASLt refused the call".into(),
        remedy: "HYWU_CUDA_BLAS=0 does without this library",
    })
}

/// The library on this device, opened at the first call; none where it is not installed, nor in a replay, which its launches can't be
/// part of.
pub(super) fn of(gpu: &'static Gpu) -> Result<Option<&'static Blas>> {
    if in_replay() {
        return Ok(None);
    }
    static ALL: Mutex<Vec<(usize, Option<&'static Blas>)>> = Mutex::new(Vec::new());
    let mut all = lock(&ALL);
    if let Some((_, blas)) = all.iter().find(|(n, _)| *n == gpu.ordinal()) {
        return Ok(*blas);
    }
    // Every other call of the bindings panics where there is no library.
    // SAFETY: it only opens and closes the library.
    let blas = match unsafe { sys::is_culib_present() } {
        // Like the context it lives as long as the process.
        true => Some(&*Box::leak(Box::new(Blas::open(gpu)?))),
        false => None,
    };
    all.push((gpu.ordinal(), blas));
    Ok(blas)
}

impl Blas {
    fn open(gpu: &'static Gpu) -> Result<Self> {
        let workspace = gpu.allocate(WORKSPACE)?;
        gpu.enter()?;
        let handle = check(|| "cublasLtCreate".into(), result::create_handle())?;
        Ok(Self { gpu, handle, workspace, plans: Mutex::default() })
    }

    /// `out` = A B + bias: m, n and k of matrices that lie so. False, and nothing done, when the library can't do this.
    ///
    /// # Errors
    /// Those of the library.
    pub fn product(
        &self,
        (layout, dims): (Layout, [usize; 3]),
        [a, b]: [&Tensor; 2],
        bias: Option<&Tensor>,
        out: &Tensor,
    ) -> Result<bool> {
        let ([m, n, k], shape) = (dims, Shape { layout, dims, bias: bias.is_some() });
        assert!(
            a.numel() == m * k && b.numel() == k * n && out.numel() == m * n,
            "the operands are of {shape:?}"
        );
        assert!(bias.is_none_or(|bias| bias.numel() == n), "the bias is of {shape:?}");
        let address = |t: &Tensor| on_gpu(OP, t).map(|view| view.address());
        let (a, b, to) = (address(a)?, address(b)?, address(out)?);
        if [a, b, to].iter().any(|address| address % u64::from(ALIGNMENT) != 0) {
            return Ok(false);
        }
        self.gpu.enter()?;
        let mut plans = lock(&self.plans);
        let plan = match plans.entry(shape) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(self.plan(shape)?),
        };
        let Some(plan) = plan else { return Ok(false) };
        let what = || format!("cublasLtMatmul of {shape:?}");
        if let Some(bias) = bias {
            let pointer = address(bias)?;
            attribute(
                plan.product,
                sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER,
                pointer,
            )?;
        }
        let stream = self.gpu.stream()?;
        let (alpha, beta) = (1.0f32, 0.0f32);
        let pointer = |address: u64| address as *const c_void;
        // Row-major C = A B is column-major C^T = B^T A^T: the operands change places.
        // SAFETY: the operands are of these sizes (asserted) on this device and stay allocated until the stream has passed; the
        // factors are read during the call.
        let launch = || unsafe {
            result::matmul(
                self.handle,
                plan.product,
                std::ptr::from_ref(&alpha).cast(),
                std::ptr::from_ref(&beta).cast(),
                pointer(b),
                plan.b,
                pointer(a),
                plan.a,
                pointer(to),
                plan.out,
                to as *mut c_void,
                plan.out,
                &plan.algorithm,
                self.workspace.address() as *mut c_void,
                WORKSPACE,
                stream.cast(),
            )
        };
        let name = || format!("cublasLt {layout:?} {m} x {n} x {k}");
        self.gpu.timed(name, || check(what, launch()))?;
        Ok(true)
    }

    /// Descriptors, and the algorithm that the library thinks the fastest.
    fn plan(&self, shape: Shape) -> Result<Option<Plan>> {
        use sys::{
            cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS, cublasLtMatmulDescAttributes_t as Desc,
            cublasLtMatmulPreferenceAttributes_t as Pref,
        };
        let [m, n, k] = shape.dims.map(|n| n as u64);
        let what = || format!("planning a product of {shape:?} with cuBLASLt");
        // A row-major matrix of so many lines, as the library sees it: column-major, transposed.
        let layout = |lines, length: u64| {
            check(
                what,
                result::create_matrix_layout(sys::cudaDataType_t::CUDA_R_16BF, length, lines, length as i64),
            )
        };
        let compute = (sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType_t::CUDA_R_32F);
        let product = check(what, result::create_matmul_desc(compute.0, compute.1))?;
        // The library's first operand is B^T, its second A^T: as they lie, unless the product takes them transposed.
        // Values of cublasOperation_t, which the bindings leave out.
        let (as_is, transposed) = (0i32, 1i32);
        let ((a, op_a), (b, op_b)) = match shape.layout {
            Layout::Nt => ((layout(m, k)?, as_is), (layout(n, k)?, transposed)),
            Layout::Nn => ((layout(m, k)?, as_is), (layout(k, n)?, as_is)),
            Layout::Tn => ((layout(k, m)?, transposed), (layout(k, n)?, as_is)),
        };
        let out = layout(m, n)?;
        attribute(product, Desc::CUBLASLT_MATMUL_DESC_TRANSA, op_b)?;
        attribute(product, Desc::CUBLASLT_MATMUL_DESC_TRANSB, op_a)?;
        if shape.bias {
            attribute(product, Desc::CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS as i32)?;
        }
        let preference = check(what, result::create_matmul_pref())?;
        let prefer = |name, value: &[u8]| {
            // SAFETY: the preference is valid, and the attribute is as long as the value.
            check(what, unsafe {
                result::set_matmul_pref_attribute(preference, name, value.as_ptr().cast(), value.len())
            })
        };
        prefer(Pref::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &(WORKSPACE as u64).to_ne_bytes())?;
        for name in [
            Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ] {
            prefer(name, &ALIGNMENT.to_ne_bytes())?;
        }
        // SAFETY: all were just created.
        let found =
            unsafe { result::get_matmul_algo_heuristic(self.handle, product, b, a, out, out, preference) };
        // SAFETY: created above, destroyed once.
        check(what, unsafe { result::destroy_matmul_pref(preference) })?;
        match found {
            Ok(found) => Ok(Some(Plan { product, a, b, out, algorithm: found.algo })),
            Err(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)) => Ok(None),
            Err(e) => check(what, Err(e)),
        }
    }
}

/// Sets an attribute of a product that takes a value of this type.
fn attribute<T: Copy>(
    product: sys::cublasLtMatmulDesc_t,
    name: sys::cublasLtMatmulDescAttributes_t,
    value: T,
) -> Result<()> {
    // SAFETY: the descriptor is valid; the value is copied.
    check(|| format!("{name:?}"), unsafe {
        result::set_matmul_desc_attribute(product, name, std::ptr::from_ref(&value).cast(), size_of::<T>())
    })
}
