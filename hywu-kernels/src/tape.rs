use crate::{Error, Result, Tensor, testing};
use std::cell::RefCell;

type Backward = Box<dyn FnOnce(&Tensor, &mut Gradients) -> Result<()>>;

/// A value on a [`Tape`], or a constant.
#[derive(Clone, Debug)]
pub struct Var {
    value: Tensor,
    node: Option<usize>,
}

impl Var {
    /// A value that needs no gradient.
    pub fn constant(value: Tensor) -> Self {
        Self { value, node: None }
    }
    /// The value.
    pub fn value(&self) -> &Tensor {
        &self.value
    }
    /// The value's shape.
    pub fn shape(&self) -> &[usize] {
        self.value.shape()
    }
    /// Does a gradient flow to it?
    pub fn requires_grad(&self) -> bool {
        self.node.is_some()
    }
    /// The same node with another view of the same elements.
    ///
    /// # Errors
    /// [`Error::Shape`] when the number of elements differs.
    pub fn reshape(&self, shape: &[usize]) -> Result<Self> {
        // Gradients are matched by element count, so a reshape needs no node of its own.
        Ok(Self { value: self.value.reshape(shape)?, node: self.node })
    }
    /// Are both the same node of one tape?
    pub fn same_node(&self, other: &Self) -> bool {
        self.node.is_some() && self.node == other.node
    }
}

/// Records fused ops for reverse-mode differentiation. An op computes its value and calls [`Tape::push`] with the closure that
/// turns the gradient of its output into those of its inputs.
#[derive(Default)]
pub struct Tape {
    nodes: RefCell<Vec<Option<Backward>>>,
    inference: bool,
}

impl Tape {
    /// A tape that records.
    pub fn new() -> Self {
        Self::default()
    }
    /// A tape that never records: ops run, nothing is kept.
    pub fn inference() -> Self {
        Self { inference: true, ..Self::default() }
    }
    /// A value whose gradient is wanted (a constant on an inference tape).
    pub fn leaf(&self, value: Tensor) -> Var {
        if self.inference {
            return Var::constant(value);
        }
        let mut nodes = self.nodes.borrow_mut();
        nodes.push(None);
        Var { value, node: Some(nodes.len() - 1) }
    }
    /// Records an op's output. When no input requires a gradient the closure is dropped and the output is a constant.
    pub fn push(
        &self,
        value: Tensor,
        inputs: &[&Var],
        backward: impl FnOnce(&Tensor, &mut Gradients) -> Result<()> + 'static,
    ) -> Var {
        let value = testing::as_naive(value);
        if self.inference || !inputs.iter().any(|v| v.requires_grad()) {
            return Var::constant(value);
        }
        let mut nodes = self.nodes.borrow_mut();
        nodes.push(Some(Box::new(backward)));
        Var { value, node: Some(nodes.len() - 1) }
    }
    /// Differentiates a scalar with respect to every leaf. What an op kept is freed as soon as it has been used.
    ///
    /// # Errors
    /// [`Error::Shape`] when `loss` is not a scalar, [`Error::Invalid`] when it does not depend on a leaf.
    pub fn backward(self, loss: &Var) -> Result<Gradients> {
        if loss.value.numel() != 1 {
            return Err(Error::shape("backward", "loss", loss.shape(), "one element"));
        }
        let node = loss.node.ok_or_else(|| Error::invalid("backward", "the loss depends on no leaf"))?;
        let mut nodes = self.nodes.into_inner();
        let mut grads = Gradients { grads: (0..nodes.len()).map(|_| None).collect() };
        grads.accumulate(loss, loss.value.full_like(loss.shape(), 1.0)?)?;
        for i in (0..=node).rev() {
            if let Some(op) = nodes[i].take()
                && let Some(grad) = grads.grads[i].take()
            {
                op(&grad, &mut grads)?;
            }
        }
        Ok(grads)
    }
}

/// The gradients that a backward pass has collected so far.
pub struct Gradients {
    grads: Vec<Option<Tensor>>,
}

impl Gradients {
    /// Is the gradient of `var` wanted at all? An op asks before it computes one.
    pub fn wants(&self, var: &Var) -> bool {
        var.node.is_some()
    }
    /// Adds a contribution to the gradient of `var`; nothing happens for a constant.
    ///
    /// # Errors
    /// [`Error::Shape`] when the number of elements is not `var`'s.
    pub fn accumulate(&mut self, var: &Var, grad: Tensor) -> Result<()> {
        let Some(i) = var.node else { return Ok(()) };
        if grad.numel() != var.value.numel() {
            return Err(Error::shape("gradient", "contribution", grad.shape(), format!("{:?}", var.shape())));
        }
        let grad = testing::as_naive(grad);
        match &mut self.grads[i] {
            Some(sum) => sum.add_assign(&grad),
            slot => {
                *slot = Some(grad);
                Ok(())
            }
        }
    }
    /// The gradient of `var` to add to in place (zeros at first), shared with nobody; none for a constant.
    ///
    /// # Errors
    /// Not enough memory on a device.
    pub fn slot(&mut self, var: &Var) -> Result<Option<&mut Tensor>> {
        let Some(i) = var.node else { return Ok(None) };
        if self.grads[i].is_none() {
            self.grads[i] = Some(var.value.zeros_like(var.shape())?);
        }
        let slot = self.grads[i].as_mut();
        if let Some(sum) = slot {
            sum.make_unique()?;
            return Ok(Some(sum));
        }
        Ok(None)
    }
    /// The gradient of a leaf, if the loss depends on it (element order of the leaf; the shape may be another).
    pub fn get(&self, var: &Var) -> Option<&Tensor> {
        self.grads[var.node?].as_ref()
    }
    /// Takes the gradient of a leaf out.
    pub fn take(&mut self, var: &Var) -> Option<Tensor> {
        self.grads[var.node?].take()
    }
}
