use std::collections::HashMap;

use crate::error::missing_value;
use crate::{Graph, GraphError, ValueKind};

impl Graph {
    /// Checks what every pass must keep true: indices in range, unique names of living values, operands before
    /// uses, outputs that point back at their node, operand counts that the operator allows, and the same for
    /// the bodies of control-flow nodes.
    ///
    /// # Errors
    /// The first violation, naming the node or value.
    pub fn verify(&self) -> Result<(), GraphError> {
        let in_range = |v: crate::ValueId| v.index() < self.values.len();
        let mut defined: Vec<bool> =
            self.values.iter().map(|v| !matches!(v.kind, ValueKind::Output { .. })).collect();
        for &input in &self.inputs {
            if !in_range(input) {
                return Err(GraphError::structure(self, missing_value(input)));
            }
            if self.value(input).kind != ValueKind::Input {
                let problem = format!("input {:?} is also made by something else", self.value(input).name);
                return Err(GraphError::structure(self, problem));
            }
        }
        let mut names: HashMap<&str, ()> = HashMap::new();
        for &input in &self.inputs {
            if names.insert(&self.value(input).name, ()).is_some() {
                let problem = format!("two inputs are called {:?}", self.value(input).name);
                return Err(GraphError::structure(self, problem));
            }
        }
        for (id, node) in self.iter_nodes() {
            let (least, most) = node.op.input_count();
            let given = node.inputs.len();
            if given < least || given > most {
                let expected = match most {
                    usize::MAX => format!("at least {least}"),
                    _ if least == most => least.to_string(),
                    _ => format!("{least} to {most}"),
                };
                return Err(GraphError::at(node, format!("has {given} inputs, expected {expected}")));
            }
            for &input in node.inputs.iter().flatten() {
                if !in_range(input) {
                    return Err(GraphError::at(node, missing_value(input)));
                }
                if !defined[input.index()] {
                    let name = &self.value(input).name;
                    return Err(GraphError::at(node, format!("reads {name:?} before anything has made it")));
                }
            }
            for (i, &output) in node.outputs.iter().enumerate() {
                let Some(output) = output else { continue };
                if !in_range(output) {
                    return Err(GraphError::at(node, missing_value(output)));
                }
                let value = self.value(output);
                if value.kind != (ValueKind::Output { node: id, output: i as u32 }) || defined[output.index()]
                {
                    return Err(GraphError::at(
                        node,
                        format!("result {:?} is also made elsewhere", value.name),
                    ));
                }
                if names.insert(&value.name, ()).is_some() {
                    return Err(GraphError::at(node, format!("two values are called {:?}", value.name)));
                }
                defined[output.index()] = true;
            }
            for body in node.op.bodies() {
                body.verify()?;
            }
        }
        for &output in &self.outputs {
            if !in_range(output) {
                return Err(GraphError::structure(self, missing_value(output)));
            }
            if !defined[output.index()] {
                let problem = format!("nothing makes the output {:?}", self.value(output).name);
                return Err(GraphError::structure(self, problem));
            }
        }
        Ok(())
    }
}
