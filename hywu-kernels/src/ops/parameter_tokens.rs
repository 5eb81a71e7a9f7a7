//! The generator's parameter tokens: initial grid and detokenisation (FORMAT.md sections 3 and 4).

use super::elementwise;
use super::together;
use crate::{Error, LoraVar, LoraVars, Result, Tape, Var};
use hywu_core::{AdapterSpec, Parameter, ParameterKind};

/// x0[n, s, j*c + i] = hw_pos[s*a + j, i] + layer_pos[n, i]: `hw_pos` [S * a, c], `layer_pos` [N, c] -> [1, N, S, a * c].
///
/// # Errors
/// Shapes that don't agree, a = 0.
pub fn token_grid(tape: &Tape, hw_pos: &Var, layer_pos: &Var, a: usize) -> Result<Var> {
    const OP: &str = "token_grid";
    let (rows, c, layers) = match (hw_pos.shape(), layer_pos.shape()) {
        (&[rows, c], &[layers, lc]) if c == lc && c > 0 && a > 0 && rows > 0 && rows % a == 0 => {
            (rows, c, layers)
        }
        (_, other) => {
            let expected = format!("[layers, c] beside hw_pos [S * {a}, c], which is {:?}", hw_pos.shape());
            return Err(Error::shape(OP, "layer_pos", other, expected));
        }
    };
    let (hw, layer) = (hw_pos.value(), layer_pos.value());
    together(OP, &[hw, layer])?;
    let grid = on_device!(hw, parameter_tokens::token_grid(hw, layer, &[1, layers, rows / a, a * c]));
    let (hw, layer) = (hw_pos.clone(), layer_pos.clone());
    Ok(tape.push(grid, &[hw_pos, layer_pos], move |grad, grads| {
        let (shape, layers) = (hw.shape(), layer.shape());
        let [dhw, dlayer] = on_device!(grad, parameter_tokens::token_grid_gradients(grad, shape, layers));
        grads.accumulate(&hw, dhw)?;
        grads.accumulate(&layer, dlayer)
    }))
}

/// Repeats [1, ..] `batch` times along the first axis.
///
/// # Errors
/// A first axis that is not 1, batch = 0.
pub fn repeat_batch(tape: &Tape, x: &Var, batch: usize) -> Result<Var> {
    if x.shape().first() != Some(&1) {
        return Err(Error::shape("repeat_batch", "x", x.shape(), "[1, ..]"));
    }
    elementwise::repeat_each(tape, x, batch)
}

/// Splits the token axis: `rows` [b, N, T, r, c] -> the first `count` tokens [b, N, count, r, c] and the rest.
///
/// # Errors
/// Another number of axes, or a side without tokens.
pub fn split_tokens(tape: &Tape, rows: &Var, count: usize) -> Result<(Var, Var)> {
    let &[b, n, t, r, c] = rows.shape() else {
        return Err(Error::shape("split_tokens", "rows", rows.shape(), "[b, N, T, r, c]"));
    };
    let flat = rows.reshape(&[b * n, t, r * c])?;
    let first = elementwise::slice_tokens(tape, &flat, 0, count)?;
    let rest = elementwise::slice_tokens(tape, &flat, count, t.saturating_sub(count))?;
    Ok((first.reshape(&[b, n, count, r, c])?, rest.reshape(&[b, n, t - count, r, c])?))
}

/// Cuts generated tokens into parameters: `tokens_a` [b, N, A, r, t], `tokens_b` [b, N, Bt, r, t] -> one pair per module and layer,
/// lora_a [b, (E,) r, in], lora_b [b, (E,) out, r], under their published names. What is left of a parameter's last token is
/// dropped.
///
/// # Errors
/// Tokens of another number or size than the spec asks for.
pub fn detokenise(tape: &Tape, spec: &AdapterSpec, tokens_a: &Var, tokens_b: &Var) -> Result<LoraVars> {
    let parameters = spec.parameters();
    let (a, b): (Vec<_>, Vec<_>) = parameters.into_iter().partition(|p| p.kind == ParameterKind::LoraA);
    let (a, b) = (cut(tape, spec, "tokens_a", tokens_a, &a)?, cut(tape, spec, "tokens_b", tokens_b, &b)?);
    let mut vars = LoraVars::none();
    for layer in 0..spec.layers {
        for module in 0..spec.modules.len() {
            let find = |side: &[(usize, Vec<Var>)]| {
                side.iter().find(|(m, _)| *m == module).map(|(_, v)| v[layer].clone())
            };
            if let (Some(a), Some(b)) = (find(&a), find(&b)) {
                vars.modules.insert(spec.module_name(layer, module), LoraVar { a, b, scale: spec.scale() });
            }
        }
    }
    Ok(vars)
}

/// One side's parameters: (module, one variable per layer).
fn cut(
    tape: &Tape,
    spec: &AdapterSpec,
    what: &'static str,
    tokens: &Var,
    parameters: &[Parameter],
) -> Result<Vec<(usize, Vec<Var>)>> {
    let width = tokens.value().dim_back(1);
    let area = spec.rank * width;
    let count: usize = parameters.iter().map(|p| p.tokens(area.max(1))).sum();
    let batch = tokens.shape().first().copied().unwrap_or(0);
    if tokens.shape() != [batch, spec.layers, count, spec.rank, width] || area == 0 {
        let expected = format!("[batch, {}, {count}, {}, token_dim]", spec.layers, spec.rank);
        return Err(Error::shape("detokenise", what, tokens.shape(), expected));
    }
    let line = count * area;
    let mut start = 0;
    let mut out = Vec::new();
    for p in parameters {
        let n = p.numel();
        let shape: Vec<usize> = [batch].into_iter().chain(p.shape.iter().copied()).collect();
        let mut layers = Vec::new();
        for layer in 0..spec.layers {
            layers.push(elementwise::cut(tape, tokens, &shape, layer * line + start, spec.layers * line, n)?);
        }
        out.push((p.module, layers));
        start += p.tokens(area) * area;
    }
    Ok(out)
}
