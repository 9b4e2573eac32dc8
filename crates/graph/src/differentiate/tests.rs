//! What the backward graph holds; that its numbers are right is tested where graphs can be run.

use super::*;
use crate::passes::testing::{Builder, check_types, operators, summary};
use crate::{BinaryOp, ConvAttributes, DType, MatMulAttributes, ReduceOp, TensorType};

/// Dense layers with ReLUs and a sum: `x`, weights `w0`, `w1`, … and hidden values `h0`, `h1`, ….
fn chain(layers: usize) -> (Graph, ValueId) {
    let mut b = Builder::new();
    let mut x = b.input("x", &[4, 8]);
    for i in 0..layers {
        let w = b.stored(&format!("w{i}"), DType::F32, &[8, 8]);
        let bias = b.stored(&format!("b{i}"), DType::F32, &[8]);
        let product = b.node(&format!("p{i}"), Op::MatMul(MatMulAttributes::default()), &[x, w]);
        let sum = b.node(&format!("s{i}"), Op::Binary(BinaryOp::Add), &[product, bias]);
        x = b.node(&format!("h{i}"), Op::Unary(UnaryOp::Relu), &[sum]);
    }
    let loss = total(&mut b, x);
    (b.finish(), loss)
}

fn total(b: &mut Builder, x: ValueId) -> ValueId {
    let sum = Op::Reduce { op: ReduceOp::Sum, keep_dims: false, noop_with_empty_axes: false };
    let loss = b.node("loss", sum, &[x]);
    b.output(loss);
    loss
}

fn run(
    graph: &mut Graph,
    loss: ValueId,
    wrt: &[&str],
    options: &DifferentiateOptions,
) -> Vec<Option<ValueId>> {
    let wrt: Vec<ValueId> = wrt.iter().map(|name| graph.find(name).unwrap()).collect();
    let gradients = differentiate(graph, loss, &wrt, options).unwrap();
    graph.outputs.extend(gradients.iter().flatten());
    graph.verify().unwrap();
    check_types(graph).unwrap();
    for (v, g) in wrt.iter().zip(&gradients) {
        if let Some(g) = g {
            assert_eq!(graph.value(*v).ty, graph.value(*g).ty);
        }
    }
    gradients
}

/// Operators behind the loss.
fn backward(graph: &Graph) -> String {
    let all = operators(graph);
    let (_, after) = all.split_once("ReduceSum ").unwrap();
    after.to_owned()
}

#[test]
fn nothing_is_computed_below_the_earliest_wanted_value() {
    let (mut g, loss) = chain(3);
    run(&mut g, loss, &["w2"], &DifferentiateOptions::default());
    assert_eq!(backward(&g), "Expand UnaryGrad MatMul", "{}", summary(&g));
    let (mut g, loss) = chain(3);
    run(&mut g, loss, &["b2"], &DifferentiateOptions::default());
    // The gradient of a bias needs no product at all.
    assert_eq!(backward(&g), "Expand UnaryGrad ChannelSum", "{}", summary(&g));
    let (mut g, loss) = chain(3);
    run(&mut g, loss, &["b1", "w2"], &DifferentiateOptions::default());
    let expected = "Expand UnaryGrad MatMul MatMul UnaryGrad ChannelSum";
    assert_eq!(backward(&g), expected, "{}", summary(&g));
    assert!(g.find("grad/w0").is_none() && g.find("grad/b0").is_none() && g.find("grad/w1").is_none());
}

#[test]
fn gradients_bear_the_names_of_their_values() {
    let (mut g, loss) = chain(2);
    let gradients = run(&mut g, loss, &["w0", "b0", "w1", "x"], &DifferentiateOptions::default());
    let names: Vec<&str> = gradients.iter().map(|v| g.value(v.unwrap()).name.as_str()).collect();
    assert_eq!(names, ["grad/w0", "grad/b0", "grad/w1", "grad/x"]);
}

#[test]
fn contributions_are_added_up_at_once() {
    let mut b = Builder::new();
    let x = b.input("x", &[4]);
    let mut sum = x;
    for i in 0..3 {
        let y = b.node(&format!("y{i}"), Op::Unary(UnaryOp::Exp), &[x]);
        sum = b.node(&format!("sum{i}"), Op::Binary(BinaryOp::Add), &[sum, y]);
    }
    let loss = total(&mut b, sum);
    let mut g = b.finish();
    let gradients = run(&mut g, loss, &["x"], &DifferentiateOptions::default());
    // y2, y1, the direct way, y0.
    assert_eq!(backward(&g), "Expand UnaryGrad UnaryGrad Add Add UnaryGrad Add", "{}", summary(&g));
    assert_eq!(g.value(gradients[0].unwrap()).name, "grad/x");
}

#[test]
fn stopped_gradients_do_not_go_on_but_are_answered() {
    let (mut g, loss) = chain(3);
    let stop = HashSet::from([g.find("h1").unwrap()]);
    let options = DifferentiateOptions { stop, ..Default::default() };
    let gradients = run(&mut g, loss, &["w0", "w1", "w2", "h1"], &options);
    assert_eq!(gradients.iter().map(Option::is_some).collect::<Vec<_>>(), [false, false, true, true]);
}

#[test]
fn a_value_in_the_middle_can_be_asked_for() {
    let (mut g, loss) = chain(3);
    let gradients = run(&mut g, loss, &["h0"], &DifferentiateOptions::default());
    assert_eq!(g.value(gradients[0].unwrap()).name, "grad/h0");
    assert!(g.find("grad/s0").is_none());
}

#[test]
fn what_the_loss_does_not_depend_on_has_none() {
    let (mut g, loss) = chain(1);
    g.add_input("other", TensorType::fixed(DType::F32, &[3]));
    let gradients = run(&mut g, loss, &["other", "w0"], &DifferentiateOptions::default());
    assert!(gradients[0].is_none() && gradients[1].is_some());
}

/// A rounding between two products.
fn rounded() -> (Graph, ValueId) {
    let mut b = Builder::new();
    let x = b.input("x", &[4, 8]);
    let w = b.stored("w", DType::F32, &[8, 8]);
    let y = b.node("product", Op::MatMul(MatMulAttributes::default()), &[x, w]);
    let y = b.node("round", Op::Unary(UnaryOp::Round), &[y]);
    let v = b.stored("v", DType::F32, &[8, 8]);
    let y = b.node("second", Op::MatMul(MatMulAttributes::default()), &[y, v]);
    let loss = total(&mut b, y);
    (b.finish(), loss)
}

#[test]
fn roundings_pass_nothing_unless_a_rule_says_so() {
    let (mut g, loss) = rounded();
    let gradients = run(&mut g, loss, &["w", "v"], &DifferentiateOptions::default());
    assert!(gradients[0].is_none() && gradients[1].is_some());
    for (selector, rule, expected) in [
        (Selector::Operator("Round".into()), GradientRule::StraightThrough, "Expand MatMul MatMul"),
        (
            Selector::Node("round".into()),
            GradientRule::StraightThroughWithin { min: -1.0, max: 1.0 },
            "Expand MatMul UnaryGrad MatMul",
        ),
    ] {
        let (mut g, loss) = rounded();
        let options = DifferentiateOptions { rules: vec![(selector, rule)], ..Default::default() };
        assert!(run(&mut g, loss, &["w"], &options)[0].is_some());
        assert_eq!(backward(&g), expected, "{}", summary(&g));
    }
}

#[test]
fn the_first_rule_that_fits_counts() {
    let (mut g, loss) = rounded();
    let rules = vec![
        (Selector::Node("round".into()), GradientRule::Exact),
        (Selector::Operator("Round".into()), GradientRule::StraightThrough),
    ];
    let options = DifferentiateOptions { rules, ..Default::default() };
    assert!(run(&mut g, loss, &["w"], &options)[0].is_none());
}

#[test]
fn a_mask_keeps_bits_from_the_forward_pass() {
    let mut b = Builder::new();
    let x = b.input("x", &[4, 8]);
    let w = b.stored("w", DType::F32, &[8, 8]);
    let y = b.node("product", Op::MatMul(MatMulAttributes::default()), &[x, w]);
    let y = b.node("act", Op::Unary(UnaryOp::HardSwish), &[y]);
    let y = b.node("more", Op::Unary(UnaryOp::Tanh), &[y]);
    let loss = total(&mut b, y);
    let mut g = b.finish();
    let rule = GradientRule::Mask(MaskRule::Above(0.0));
    let options = DifferentiateOptions {
        rules: vec![(Selector::Operator("HardSwish".into()), rule)],
        ..Default::default()
    };
    run(&mut g, loss, &["w"], &options);
    let expected = "MatMul SignMask HardSwish Tanh ReduceSum Expand UnaryGrad MaskGrad MatMul";
    assert_eq!(operators(&g), expected, "{}", summary(&g));
    // The product itself is read by nobody behind the activation.
    let product = g.find("product").unwrap();
    let readers: Vec<&str> = g.consumers()[product.index()].iter().map(|&n| g.node(n).op.name()).collect();
    assert_eq!(readers, ["SignMask", "HardSwish"]);
}

/// Something without a derivative between two products.
fn obstructed() -> (Graph, ValueId) {
    let mut b = Builder::new();
    let x = b.input("x", &[4, 8]);
    let w = b.stored("w", DType::F32, &[8, 8]);
    let y = b.node("product", Op::MatMul(MatMulAttributes::default()), &[x, w]);
    let scale = b.scalar(0.1);
    let attributes =
        crate::QuantizeAttributes { axis: 0, block_size: 0, output_dtype: Some(DType::I8), saturate: true };
    let y = b.node("quantize", Op::QuantizeLinear(attributes.clone()), &[y, scale]);
    let plain = crate::QuantizeAttributes { output_dtype: None, ..attributes };
    let y = b.node("dequantize", Op::DequantizeLinear(plain), &[y, scale]);
    let v = b.stored("v", DType::F32, &[8, 8]);
    let y = b.node("second", Op::MatMul(MatMulAttributes::default()), &[y, v]);
    let loss = total(&mut b, y);
    (b.finish(), loss)
}

#[test]
fn an_operator_without_derivative_is_an_error_only_on_the_way() {
    let (mut g, loss) = obstructed();
    let w = g.find("w").unwrap();
    let e = differentiate(&mut g, loss, &[w], &DifferentiateOptions::default()).unwrap_err().to_string();
    for part in ["dequantize", "DequantizeLinear", "\"w\"", "straight-through"] {
        assert!(e.contains(part), "{e}");
    }
    // Below the earliest wanted value it does not matter.
    let (mut g, loss) = obstructed();
    assert!(run(&mut g, loss, &["v"], &DifferentiateOptions::default())[0].is_some());
    // And a rule gets over it.
    let (mut g, loss) = obstructed();
    let through = |name: &str| (Selector::Operator(name.to_owned()), GradientRule::StraightThrough);
    let rules = vec![through("QuantizeLinear"), through("DequantizeLinear")];
    let options = DifferentiateOptions { rules, ..Default::default() };
    assert!(run(&mut g, loss, &["w"], &options)[0].is_some());
    assert_eq!(backward(&g), "Expand MatMul MatMul", "{}", summary(&g));
}

#[test]
fn open_shapes_and_losses_that_are_no_number_are_refused() {
    let mut b = Builder::new();
    let ty = TensorType {
        dtype: DType::F32,
        shape: Some(vec![crate::Dim::Symbol("batch".into()), crate::Dim::Fixed(8)]),
    };
    let x = b.graph.add_input("x", ty);
    let y = b.node("act", Op::Unary(UnaryOp::Tanh), &[x]);
    let loss = total(&mut b, y);
    let mut g = b.finish();
    let e = differentiate(&mut g, loss, &[x], &DifferentiateOptions::default()).unwrap_err().to_string();
    assert!(e.contains("batch") && e.contains("dimension 0") && e.contains("loss"), "{e}");
    let (mut g, _) = chain(1);
    let (h, w) = (g.find("h0").unwrap(), g.find("w0").unwrap());
    let e = differentiate(&mut g, h, &[w], &DifferentiateOptions::default()).unwrap_err().to_string();
    assert!(e.contains("h0") && e.contains("single number"), "{e}");
}

#[test]
fn an_activation_that_hides_its_operand_is_split_off_only_where_a_gradient_passes() {
    let mut b = Builder::new();
    let mut x = b.input("x", &[1, 4, 8, 8]);
    for i in 0..2 {
        let w = b.stored(&format!("w{i}"), DType::F32, &[4, 4, 1, 1]);
        let a = ConvAttributes { activation: Some(UnaryOp::HardSwish), ..ConvAttributes::default() };
        x = b.node(&format!("c{i}"), Op::Conv(a), &[x, w]);
    }
    let loss = total(&mut b, x);
    let mut g = b.finish();
    run(&mut g, loss, &["w1"], &DifferentiateOptions::default());
    let expected = "Conv Conv HardSwish ReduceSum Expand UnaryGrad ConvWeightGrad";
    assert_eq!(operators(&g), expected, "{}", summary(&g));
    assert_eq!(g.find("c1").and_then(|v| g.producer(v)).map(|n| g.node(n).op.name()), Some("HardSwish"));
}

#[test]
fn picked_weights_become_states_that_start_with_their_value() {
    let (mut g, loss) = chain(2);
    g.add_constant("count", crate::Tensor::from_slice(&[1], &[3i64]));
    let states = parameters_to_states(&mut g, |name, _| name != "w1");
    let names: Vec<&str> = states.iter().map(|&v| g.value(v).name.as_str()).collect();
    assert_eq!(names, ["w0", "b0", "b1"]);
    assert!(states.iter().all(|&v| matches!(g.value(v).kind, ValueKind::State(Some(_)))));
    assert!(run(&mut g, loss, &["w0"], &DifferentiateOptions::default())[0].is_some());
}
