//! Running a program for fewer rows than it was made for.
//!
//! Some inputs have a leading dimension that differs from run to run, such as the tokens of a step. The plan is made
//! for the most rows of each such *class*; a run for fewer gives every operand of the class its first part. That works
//! because the kernels on the way compute row by row, and is checked when the session is made.

use lightering_graph::Op;

use crate::EngineError;
use crate::kernel::Kernel;
use crate::program::{BufferKind, Operand, Program, Storage};

/// Which buffers hold rows, and of which class.
#[derive(Debug, Default)]
pub(crate) struct Rows {
    /// Per buffer.
    class: Vec<Option<usize>>,
    /// Per class: the rows that the program was made for, and those of the present run.
    most: Vec<usize>,
    now: Vec<usize>,
}

impl Rows {
    /// Follows the classes, each a list of inputs, through the program.
    pub fn of(program: &Program, classes: &[Vec<String>]) -> Result<Rows, EngineError> {
        let mut rows = Rows { class: vec![None; program.buffers.len()], ..Rows::default() };
        for (class, names) in classes.iter().enumerate() {
            let mut most = None;
            for name in names {
                let port = program.inputs.iter().find(|p| p.name == *name);
                let tensor = port.map(|p| &program.tensors[p.tensor]);
                let (Some(tensor), Some(&leading)) = (tensor, tensor.and_then(|t| t.dims.first())) else {
                    return Err(EngineError::Invalid(format!("there is no input {name:?} with rows")));
                };
                if most.is_some_and(|m| m != leading) {
                    return Err(EngineError::Invalid(format!(
                        "input {name:?} has {leading} rows, unlike others"
                    )));
                }
                most = Some(leading);
                if let Storage::Buffer { buffer, .. } = tensor.storage {
                    rows.class[buffer] = Some(class);
                }
            }
            rows.most.push(most.unwrap_or(0));
        }
        rows.now.clone_from(&rows.most);
        if classes.is_empty() {
            return Ok(rows);
        }
        for instruction in &program.instructions {
            let class_of = |operand: &Option<Operand>| {
                let Storage::Buffer { buffer, .. } = program.tensors[operand.as_ref()?.tensor].storage else {
                    return None;
                };
                rows.class[buffer]
            };
            // What is picked by index has as many rows as there are indices.
            let picked = matches!(instruction.node.op, Op::Gather { axis: 0 });
            let class = match picked {
                true => instruction.inputs.get(1).and_then(class_of),
                false => instruction.inputs.iter().find_map(class_of),
            };
            let touched = instruction.inputs.iter().any(|o| class_of(o).is_some());
            if touched && !instruction.kernel.is_row_wise(&instruction.node.op) {
                let problem = format!(
                    "{} ({}) does not compute row by row, so that it cannot run for fewer rows than planned",
                    instruction.node.name,
                    instruction.node.op.name()
                );
                return Err(EngineError::Invalid(problem));
            }
            for output in instruction.outputs.iter().flatten() {
                if let Storage::Buffer { buffer, .. } = program.tensors[output.tensor].storage
                    && program.buffers[buffer].kind != BufferKind::State
                {
                    rows.class[buffer] = class;
                }
            }
            debug_assert!(!matches!(instruction.kernel, Kernel::Dynamic) || !touched);
        }
        Ok(rows)
    }

    /// Rows of each class in the run that begins now.
    pub fn begin(&mut self, rows: &[usize]) -> Result<(), EngineError> {
        if rows.len() != self.most.len() {
            return Err(EngineError::Invalid(format!(
                "{} row counts are given, but there are {} classes of rows",
                rows.len(),
                self.most.len()
            )));
        }
        if let Some((n, most)) = rows.iter().zip(&self.most).find(|(n, most)| n > most || **n == 0) {
            return Err(EngineError::Invalid(format!("{n} rows are asked for, the plan is for 1 to {most}")));
        }
        self.now.clear();
        self.now.extend_from_slice(rows);
        Ok(())
    }

    /// The run is for as many rows as the program was made for.
    pub fn begin_full(&mut self) {
        self.now.clone_from(&self.most);
    }

    /// The part of an instruction's work that a run for one row of each class does.
    pub fn one_row_share(&self, program: &Program, instruction: &crate::program::Instruction) -> f64 {
        let operands = instruction.outputs.iter().chain(&instruction.inputs).flatten();
        let class = operands.filter_map(|o| match program.tensors[o.tensor].storage {
            Storage::Buffer { buffer, .. } => self.class[buffer],
            _ => None,
        });
        class.map(|c| 1.0 / self.most[c].max(1) as f64).next().unwrap_or(1.0)
    }

    /// The operand as this run sees it: itself, or its first rows.
    pub fn part(&self, program: &Program, operand: &Operand) -> Option<Operand> {
        let Storage::Buffer { buffer, .. } = program.tensors[operand.tensor].storage else { return None };
        let class = self.class[buffer]?;
        let (now, most) = (self.now[class], self.most[class]);
        if now == most {
            return None;
        }
        let mut part = operand.clone();
        let bytes = operand.bytes.len() / most * now;
        part.bytes = operand.bytes.start..operand.bytes.start + bytes;
        if let Some(leading) = part.dims.first_mut() {
            *leading = *leading / most * now;
        }
        Some(part)
    }
}
