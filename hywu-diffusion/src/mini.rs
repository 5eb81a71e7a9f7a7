use crate::{Backbone, EditBatch, Error, flow_loss};
use hywu_core::{AdapterSpec, Dtype};
use hywu_kernels::{Device, Downstream, LoraVars, Tape, Tensor, Var};

/// The frozen mini backbone as what a generator is trained for.
pub struct MiniDownstream {
    /// Never changed by training through it.
    pub backbone: Backbone,
    spec: AdapterSpec,
}

impl MiniDownstream {
    /// Adapters of `rank`, their low-rank term scaled by alpha / rank.
    ///
    /// # Errors
    /// A rank of zero, or an alpha that is not a finite number.
    pub fn new(backbone: Backbone, rank: usize, alpha: f32) -> crate::Result<Self> {
        let spec = backbone.adapter_spec(rank, alpha);
        spec.validate()?;
        Ok(Self { backbone, spec })
    }

    /// The same on a device, computing in `dtype` there; see [`Backbone::to`].
    ///
    /// # Errors
    /// A device that can't be used, or has not enough memory.
    pub fn to(&self, device: Device, dtype: Dtype) -> crate::Result<Self> {
        Ok(Self { backbone: self.backbone.to(device, dtype)?, spec: self.spec.clone() })
    }
}

impl Downstream for MiniDownstream {
    type Batch = EditBatch;

    fn adapter_spec(&self) -> &AdapterSpec {
        &self.spec
    }

    fn condition(&self, batch: &EditBatch) -> hywu_kernels::Result<Tensor> {
        let views = batch.views(self.backbone.config.views());
        self.backbone.condition(&views, &batch.text).map_err(kernel_error)
    }

    fn loss(&self, tape: &Tape, batch: &EditBatch, adapters: &LoraVars) -> hywu_kernels::Result<Var> {
        let frozen = self.backbone.params.bind(tape, false)?;
        flow_loss(tape, &self.backbone, &frozen, batch, adapters).map_err(kernel_error)
    }
}

/// The trait speaks in errors of the kernels.
pub(crate) fn kernel_error(e: Error) -> hywu_kernels::Error {
    match e {
        Error::Kernel(e) => e,
        Error::Core(e) => e.into(),
        e => hywu_kernels::Error::invalid("mini backbone", e.to_string()),
    }
}
