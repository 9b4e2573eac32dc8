//! The intermediate representation, shape inference, costs and passes.
