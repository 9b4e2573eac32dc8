//! Conversion of checkpoints and GGUF files: names, orders and values of the families, and what damaged files end in.

use std::sync::Arc;

use lightering_formats::gguf::{GgufFile, Value};
use lightering_kernels::dequantize_row;
use lightering_lm::{CheckpointFiles, Conversion, ConversionOptions, ConversionReport, Recipe, Tokenizer};
use lightering_tier::ByteSource;
use lightering_units::{BlockFormat, Bytes};
use proptest::prelude::*;
use serde_json::{Value as Json, json};

/// A safetensors file of f32 tensors whose elements count on from 1, scaled to stay small.
fn safetensors(tensors: &[(String, Vec<usize>)]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut data: Vec<u8> = Vec::new();
    for (name, shape) in tensors {
        let from = data.len();
        let count: usize = shape.iter().product();
        for i in 0..count {
            data.extend(((i as f32 + 1.0) / 64.0).to_le_bytes());
        }
        header.insert(
            name.clone(),
            json!({"dtype": "F32", "shape": shape, "data_offsets": [from, data.len()]}),
        );
    }
    let header = serde_json::to_vec(&header).unwrap();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend(data);
    file
}

const ROWS: usize = 262;
const WIDTH: usize = 64;

/// A vocabulary of the 256 bytes, two merges and two special tokens.
fn tokenizer() -> Json {
    let codes = (0x21..=0x7e).chain(0xa1..=0xac).chain(0xae..=0xff).chain(0x100..0x144);
    let mut tokens: Vec<String> = codes.map(|c| char::from_u32(c).unwrap().to_string()).collect();
    tokens.extend(["hi", "hit"].map(String::from));
    let vocab: serde_json::Map<String, Json> =
        tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
    json!({
        "added_tokens": [
            {"id": 258, "content": "<|endoftext|>", "special": true},
            {"id": 259, "content": "<tool>", "special": false},
        ],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true},
        "post_processor": null,
        "model": {"type": "BPE", "vocab": vocab, "merges": ["h i", ["hi", "t"]]},
    })
}

struct Model {
    config: Json,
    tensors: Vec<(String, Vec<usize>)>,
    tokenizer: Option<Json>,
}

impl Model {
    /// A decoder of one layer with 2 heads of 32 that follows Llama.
    fn llama(model_type: &str) -> Model {
        let layer = "model.layers.0.";
        let tensors = [
            ("model.embed_tokens.weight".to_owned(), vec![ROWS, WIDTH]),
            ("model.norm.weight".to_owned(), vec![WIDTH]),
            ("lm_head.weight".to_owned(), vec![ROWS, WIDTH]),
            (format!("{layer}input_layernorm.weight"), vec![WIDTH]),
            (format!("{layer}post_attention_layernorm.weight"), vec![WIDTH]),
            (format!("{layer}self_attn.q_proj.weight"), vec![WIDTH, WIDTH]),
            (format!("{layer}self_attn.k_proj.weight"), vec![32, WIDTH]),
            (format!("{layer}self_attn.v_proj.weight"), vec![32, WIDTH]),
            (format!("{layer}self_attn.o_proj.weight"), vec![WIDTH, WIDTH]),
            (format!("{layer}mlp.gate_proj.weight"), vec![96, WIDTH]),
            (format!("{layer}mlp.up_proj.weight"), vec![96, WIDTH]),
            (format!("{layer}mlp.down_proj.weight"), vec![WIDTH, 96]),
        ];
        Model {
            config: json!({
                "model_type": model_type, "hidden_size": WIDTH, "num_hidden_layers": 1,
                "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 96,
                "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "eos_token_id": 258,
            }),
            tensors: tensors.into(),
            tokenizer: Some(tokenizer()),
        }
    }

    fn without(mut self, part: &str) -> Model {
        self.tensors.retain(|(name, _)| !name.contains(part));
        self
    }

    fn with(mut self, name: &str, shape: &[usize]) -> Model {
        self.tensors.push((name.to_owned(), shape.to_vec()));
        self
    }

    fn files(&self) -> CheckpointFiles {
        let source = |bytes: Vec<u8>| -> Arc<dyn ByteSource> { Arc::new(bytes) };
        let json = |value: &Json| source(serde_json::to_vec(value).unwrap());
        CheckpointFiles {
            name: "small".to_owned(),
            weights: vec![source(safetensors(&self.tensors))],
            config: json(&self.config),
            tokenizer: self.tokenizer.as_ref().map(json),
            tokenizer_config: None,
            generation_config: None,
            chat_template: None,
        }
    }

    fn converted(&self, recipe: &str) -> (Vec<u8>, GgufFile, ConversionReport) {
        let mut conversion = Conversion::of_checkpoint(&self.files()).unwrap();
        conversion.set_recipe(recipe.parse().unwrap());
        write(conversion, ConversionOptions::default())
    }

    fn refused(&self, parts: &[&str]) {
        let error = Conversion::of_checkpoint(&self.files()).unwrap_err().to_string();
        for part in parts {
            assert!(error.contains(part), "{part:?} is missing from {error}");
        }
    }
}

fn write(conversion: Conversion, options: ConversionOptions) -> (Vec<u8>, GgufFile, ConversionReport) {
    let mut last = Bytes::ZERO;
    let (bytes, report) = conversion
        .write(Vec::new(), options, &mut |done| {
            assert!(done >= last);
            last = done;
        })
        .unwrap();
    assert_eq!(last, report.after);
    assert_eq!(report.file.0, bytes.len() as u64);
    let file = GgufFile::read(&bytes).unwrap();
    (bytes, file, report)
}

fn values(bytes: &[u8], file: &GgufFile, name: &str) -> Vec<f32> {
    let t = file.tensor(name).unwrap_or_else(|| panic!("{name} is missing"));
    let mut out = vec![0.0; t.dims.iter().product::<u64>() as usize];
    dequantize_row(t.format, &bytes[t.offset as usize..][..t.size.0 as usize], &mut out);
    out
}

/// What [`safetensors`] puts at this place.
fn element(at: usize) -> f32 {
    (at as f32 + 1.0) / 64.0
}

#[test]
fn rows_of_queries_and_keys_change_places_where_the_architecture_turns_neighbours() {
    let (bytes, file, _) = Model::llama("llama").converted("F32");
    let q = values(&bytes, &file, "blk.0.attn_q.weight");
    for head in 0..2 {
        for i in 0..16 {
            for (half, to) in [(0, 2 * i), (16, 2 * i + 1)] {
                let (from, to) = (head * 32 + half + i, head * 32 + to);
                assert_eq!(q[to * WIDTH + 5], element(from * WIDTH + 5), "row {from} of queries");
            }
        }
    }
    assert_eq!(values(&bytes, &file, "blk.0.attn_v.weight")[77], element(77));
    let qwen = Model::llama("qwen2")
        .with("model.layers.0.self_attn.q_proj.bias", &[WIDTH])
        .with("model.layers.0.self_attn.k_proj.bias", &[32])
        .with("model.layers.0.self_attn.v_proj.bias", &[32]);
    let (bytes, file, _) = qwen.converted("F32");
    assert_eq!(values(&bytes, &file, "blk.0.attn_q.weight")[77], element(77));
    assert_eq!(values(&bytes, &file, "blk.0.attn_q.bias")[9], element(9));
    // Biases of Llama change places as the rows do.
    let mut biased = qwen;
    biased.config["model_type"] = json!("llama");
    let (bytes, file, _) = biased.converted("Q8_0");
    let bias = values(&bytes, &file, "blk.0.attn_q.bias");
    assert_eq!((bias[0], bias[1], bias[33]), (element(0), element(16), element(48)));
    assert_eq!(file.tensor("blk.0.attn_q.weight").unwrap().format, BlockFormat::Q8_0);
}

#[test]
fn gains_of_gemma_get_the_one_that_they_lack() {
    let gemma = Model::llama("gemma2")
        .with("model.layers.0.pre_feedforward_layernorm.weight", &[WIDTH])
        .with("model.layers.0.post_feedforward_layernorm.weight", &[WIDTH]);
    let mut gemma = gemma;
    gemma.config["head_dim"] = json!(32);
    gemma.config["sliding_window"] = json!(64);
    gemma.config["query_pre_attn_scalar"] = json!(16);
    let (bytes, file, _) = gemma.converted("F16");
    for norm in ["attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"] {
        assert_eq!(values(&bytes, &file, &format!("blk.0.{norm}.weight"))[3], 1.0 + element(3), "{norm}");
    }
    assert_eq!(values(&bytes, &file, "output_norm.weight")[0], 1.0 + element(0));
    assert_eq!(file.metadata.get_f32("gemma2.attention.scale").unwrap(), Some(0.25));
    assert_eq!(file.metadata.get_u64("gemma2.attention.sliding_window").unwrap(), Some(64));
    // The embeddings are the output matrix.
    assert!(file.tensor("output.weight").is_none());
}

#[test]
fn experts_are_stacked_and_routers_stay_precise() {
    let mut mixtral = Model::llama("mixtral")
        .without("mlp.")
        .with("model.layers.0.block_sparse_moe.gate.weight", &[3, WIDTH]);
    for expert in 0..3 {
        for (part, shape) in [("w1", [32, WIDTH]), ("w2", [WIDTH, 32]), ("w3", [32, WIDTH])] {
            let name = format!("model.layers.0.block_sparse_moe.experts.{expert}.{part}.weight");
            mixtral = mixtral.with(&name, &shape);
        }
    }
    mixtral.config["num_local_experts"] = json!(3);
    mixtral.config["num_experts_per_tok"] = json!(2);
    let (bytes, file, _) = mixtral.converted("Q8_0");
    assert_eq!(file.tensor("blk.0.ffn_down_exps.weight").unwrap().dims, [32, 64, 3]);
    assert_eq!(file.tensor("blk.0.ffn_gate_inp.weight").unwrap().format, BlockFormat::F32);
    let up = values(&bytes, &file, "blk.0.ffn_up_exps.weight");
    assert_eq!(up[..32 * WIDTH], up[2 * 32 * WIDTH..], "the experts were made alike");
    mixtral.without("experts.1.").refused(&["ffn_", "2 experts", "3 experts"]);
}

#[test]
fn gpt2_is_transposed() {
    let layer = |part: &str| format!("transformer.h.0.{part}");
    let mut tensors = vec![
        ("transformer.wte.weight".to_owned(), vec![ROWS, WIDTH]),
        ("transformer.wpe.weight".to_owned(), vec![128, WIDTH]),
        (layer("attn.c_attn.weight"), vec![WIDTH, 3 * WIDTH]),
        (layer("attn.c_proj.weight"), vec![WIDTH, WIDTH]),
        (layer("mlp.c_fc.weight"), vec![WIDTH, 4 * WIDTH]),
        (layer("mlp.c_proj.weight"), vec![4 * WIDTH, WIDTH]),
        (layer("attn.bias"), vec![128, 128]),
    ];
    for (part, n) in [("attn.c_attn", 3), ("attn.c_proj", 1), ("mlp.c_fc", 4), ("mlp.c_proj", 1)] {
        tensors.push((layer(&format!("{part}.bias")), vec![n * WIDTH]));
    }
    for norm in [layer("ln_1"), layer("ln_2"), "transformer.ln_f".to_owned()] {
        tensors.extend(["weight", "bias"].map(|kind| (format!("{norm}.{kind}"), vec![WIDTH])));
    }
    let config =
        json!({"model_type": "gpt2", "n_embd": WIDTH, "n_layer": 1, "n_head": 2, "n_positions": 128});
    let model = Model { config, tensors, tokenizer: None };
    let conversion = Conversion::of_checkpoint(&model.files()).unwrap();
    assert!(conversion.notes()[0].contains("no tokenizer"), "{:?}", conversion.notes());
    let (bytes, file, _) = model.converted("F32");
    let qkv = values(&bytes, &file, "blk.0.attn_qkv.weight");
    assert_eq!(file.tensor("blk.0.attn_qkv.weight").unwrap().dims, [64, 192]);
    for (row, column) in [(0, 0), (191, 63), (100, 7)] {
        assert_eq!(qkv[row * WIDTH + column], element(column * 3 * WIDTH + row));
    }
}

#[test]
fn the_frequencies_of_llama_3_come_as_factors() {
    let mut model = Model::llama("llama");
    model.config["rope_theta"] = json!(500_000.0);
    model.config["rope_scaling"] = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192});
    let (bytes, file, _) = model.converted("F16");
    let factors = values(&bytes, &file, "rope_freqs.weight");
    assert_eq!((factors.len(), factors[0], factors[15]), (16, 1.0, 8.0));
    assert!(factors.windows(2).all(|w| w[0] <= w[1]), "{factors:?}");
    model.config["rope_scaling"] = json!({"type": "linear", "factor": 4.0});
    let (_, file, _) = model.converted("F16");
    assert_eq!(file.metadata.get_f32("llama.rope.scaling.factor").unwrap(), Some(4.0));
    model.config["rope_scaling"] = json!({"type": "dynamic", "factor": 4.0});
    model.refused(&["dynamic", "not supported"]);
}

#[test]
fn tokenizers_with_bytes_and_with_characters() {
    let (_, file, _) = Model::llama("llama").converted("F16");
    let tokenizer = Tokenizer::from_gguf(&file.metadata).unwrap();
    assert_eq!(file.metadata.get_str("tokenizer.ggml.pre").unwrap(), Some("gpt-2"));
    assert_eq!(tokenizer.token_count(), ROWS, "as many as there are embeddings");
    assert_eq!(tokenizer.encode("hit<tool>", true, false).unwrap(), [257, 259]);
    assert_eq!(tokenizer.encode("<|endoftext|>", false, true).unwrap(), [258]);
    assert!(tokenizer.is_end(258));

    // A vocabulary of characters as SentencePiece makes it, with a fallback to bytes.
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).into();
    tokens.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
    tokens.truncate(ROWS - 6);
    tokens.extend(["▁", "a", "b", "ab", "▁ab", "ba"].map(String::from));
    let vocab: serde_json::Map<String, Json> =
        tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
    let mut model = Model::llama("llama");
    model.tokenizer = Some(json!({
        "added_tokens": [{"id": 1, "content": "<s>", "special": true}, {"id": 2, "content": "</s>", "special": true}],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]},
        "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}}]},
        "model": {"type": "BPE", "byte_fallback": true, "unk_token": "<unk>", "vocab": vocab,
            "merges": ["b a", "a b", "▁ ab"]},
    }));
    model.config["eos_token_id"] = json!(2);
    let (_, file, _) = model.converted("F16");
    let tokenizer = Tokenizer::from_gguf(&file.metadata).unwrap();
    let id = |text: &str| tokenizer.token_id(text).unwrap();
    // "b a" comes before "a b".
    assert_eq!(tokenizer.encode("aba", true, false).unwrap(), [1, id("▁"), id("a"), id("ba")]);
    assert_eq!(tokenizer.encode("ab", true, false).unwrap(), [1, id("▁ab")]);
    assert_eq!(tokenizer.encode("\u{1}", false, false).unwrap(), [id("▁"), 4]);

    model.tokenizer = Some(json!({"model": {"type": "Unigram", "vocab": [["a", -1.0]]}}));
    model.refused(&["Unigram", "BPE"]);
    let mut odd = self::tokenizer();
    odd["pre_tokenizer"] = json!({"type": "Split", "pattern": {"Regex": "[a-c]+"}, "behavior": "Isolated"});
    odd["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [odd["pre_tokenizer"],
        {"type": "ByteLevel", "add_prefix_space": false, "use_regex": false}]});
    model.tokenizer = Some(odd);
    model.refused(&["[a-c]+", "not supported"]);
}

#[test]
fn what_does_not_fit_together_is_refused_with_its_place() {
    Model::llama("mamba").refused(&["\"mamba\"", "llama", "qwen2", "gemma3_text", "gpt2"]);
    Model::llama("llama").without("k_proj").refused(&["blk.0.attn_k.weight", "no such tensor"]);
    Model::llama("llama").without("embed").refused(&["token_embd.weight"]);
    Model::llama("llama")
        .with("model.layers.0.mlp.new_proj.weight", &[4, 4])
        .refused(&["new_proj", "do not have"]);
    Model::llama("llama")
        .without("up_proj")
        .with("model.layers.0.mlp.up_proj.weight", &[97, WIDTH])
        .refused(&["ffn_up"]);
    for (key, value, parts) in [
        ("hidden_size", json!(-1), ["hidden_size", "from 0 to"]),
        ("num_attention_heads", json!(0), ["num_attention_heads", "positive"]),
        ("hidden_act", json!("relu"), ["relu", "not supported"]),
        ("quantization_config", json!({"bits": 4}), ["quantised already", "not supported"]),
        ("rope_theta", json!("x"), ["rope_theta", "finite"]),
        ("head_dim", json!(16), ["attn_", "shape"]),
    ] {
        let mut model = Model::llama("llama");
        model.config[key] = value;
        model.refused(&parts);
    }
}

#[test]
fn any_memory_and_any_threads_give_the_same_file_and_too_little_is_refused() {
    let plan = || {
        let mut conversion = Conversion::of_checkpoint(&Model::llama("llama").files()).unwrap();
        conversion.set_recipe("q4_k_m".parse().unwrap());
        conversion
    };
    let smallest = plan().smallest_memory();
    let whole = write(plan(), ConversionOptions::default());
    for (beyond, threads) in [(0, 1), (1000, 3), (100_000, 2)] {
        let memory = Some(Bytes(smallest.0 + beyond));
        let same = write(plan(), ConversionOptions { memory, threads });
        assert!(same.0 == whole.0, "{beyond} bytes more, {threads} threads");
        assert_eq!(same.2, whole.2);
    }
    let options = ConversionOptions { memory: Some(Bytes(smallest.0 - 1)), threads: 1 };
    let error = plan().write(Vec::new(), options, &mut |_| ()).unwrap_err().to_string();
    assert!(error.contains("at least"), "{error}");
}

#[test]
fn errors_of_formats_are_those_of_their_steps() {
    let mut errors = Vec::new();
    for recipe in ["F32", "F16", "Q8_0", "Q5_0", "Q4_0"] {
        let (_, _, report) = Model::llama("llama").converted(recipe);
        let to: BlockFormat =
            recipe.parse::<Recipe>().map(|r| BlockFormat::from_name(&r.to_string()).unwrap()).unwrap();
        let row = report.formats.iter().find(|f| f.to == to).unwrap();
        errors.push(row.relative_error.unwrap_or(0.0));
    }
    assert_eq!(errors[0], 0.0);
    assert!(errors.windows(2).all(|w| w[0] < w[1]), "{errors:?}");
    assert!(errors[1] < 5e-4 && errors[2] < 5e-3 && errors[4] < 0.1, "{errors:?}");
}

#[test]
fn a_gguf_file_keeps_its_metadata_and_small_tensors() {
    let (bytes, before, _) = Model::llama("llama").converted("F16");
    let mut conversion = Conversion::of_gguf(Arc::new(bytes.clone())).unwrap();
    conversion.set_recipe("Q8_0".parse().unwrap());
    let (again, file, report) = write(conversion, ConversionOptions::default());
    let (direct, _, _) = Model::llama("llama").converted("Q8_0");
    // The weights are exact in F16 but for some that round; norms are exact.
    assert_eq!(values(&again, &file, "output_norm.weight"), values(&bytes, &before, "output_norm.weight"));
    assert_eq!(again.len(), direct.len());
    assert_eq!(file.metadata.get_u64("general.file_type").unwrap(), Some(7));
    for (key, value) in before.metadata.iter().filter(|(key, _)| !key.starts_with("general.file")) {
        assert_eq!(file.metadata.get(key), Some(value), "{key}");
    }
    let copied = report.formats.iter().find(|f| f.from == BlockFormat::F32).unwrap();
    assert_eq!((copied.to, copied.relative_error), (BlockFormat::F32, None));
    let parts = Value::U16(2);
    let mut metadata = before.metadata.clone();
    metadata.set("split.count", parts);
    let file = lightering_formats::gguf::GgufWriter::with_metadata(metadata)
        .begin(Vec::new())
        .unwrap()
        .finish()
        .unwrap();
    assert!(Conversion::of_gguf(Arc::new(file)).unwrap_err().to_string().contains("several"));
}

#[test]
fn weights_that_are_not_finite_are_named() {
    let mut files = Model::llama("llama").files();
    let mut bytes = safetensors(&Model::llama("llama").tensors);
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    files.weights = vec![Arc::new(bytes)];
    let mut conversion = Conversion::of_checkpoint(&files).unwrap();
    conversion.set_recipe("Q8_0".parse().unwrap());
    let error =
        conversion.write(Vec::new(), ConversionOptions::default(), &mut |_| ()).unwrap_err().to_string();
    assert!(error.contains("not finite") && error.contains("row"), "{error}");
}

/// An output that is full after some bytes.
struct Full(usize);

impl std::io::Write for Full {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if bytes.len() > self.0 {
            return Err(std::io::ErrorKind::StorageFull.into());
        }
        self.0 -= bytes.len();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_full_disk_is_an_error_wherever_it_comes() {
    let (bytes, _, _) = Model::llama("llama").converted("F16");
    for room in (0..bytes.len()).step_by(9973) {
        let mut conversion = Conversion::of_checkpoint(&Model::llama("llama").files()).unwrap();
        conversion.set_recipe("F16".parse().unwrap());
        let error = conversion.write(Full(room), ConversionOptions::default(), &mut |_| ());
        let error = error.map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("no storage space"), "{error}");
    }
}

fn rounds() -> u32 {
    if std::env::var_os("LIGHTER_SLOW").is_some() { 20_000 } else { 300 }
}

/// Damages one of the four inputs; whatever it is, planning and writing end in a result.
fn damaged(which: usize, flips: &[(prop::sample::Index, u8)], end: prop::sample::Index) {
    let model = Model::llama("llama");
    let mut parts = [
        serde_json::to_vec(&model.config).unwrap(),
        serde_json::to_vec(model.tokenizer.as_ref().unwrap()).unwrap(),
        safetensors(&model.tensors),
        br#"{"eos_token":{"content":"<|endoftext|>"},"add_bos_token":false,"chat_template":[{"name":"default","template":"x"}]}"#.to_vec(),
    ];
    let bytes = &mut parts[which];
    // Of the weights, the header is what can be wrong.
    let span = if which == 2 { 1600 } else { bytes.len() };
    for (at, bit) in flips {
        bytes[at.index(span)] ^= 1 << bit;
    }
    bytes.truncate(end.index(bytes.len() * 2).min(bytes.len()));
    let [config, tokenizer, weights, tokenizer_config] = parts;
    let files = CheckpointFiles {
        weights: vec![Arc::new(weights)],
        config: Arc::new(config),
        tokenizer: Some(Arc::new(tokenizer)),
        tokenizer_config: Some(Arc::new(tokenizer_config)),
        ..model.files()
    };
    let Ok(mut conversion) = Conversion::of_checkpoint(&files) else { return };
    conversion.set_recipe("Q8_0".parse().unwrap());
    let Ok((bytes, _)) = conversion.write(Vec::new(), ConversionOptions::default(), &mut |_| ()) else {
        return;
    };
    let file = GgufFile::read(&bytes).expect("what was written can be read");
    let _ = Tokenizer::from_gguf(&file.metadata);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(rounds()))]

    #[test]
    fn damaged_checkpoints_end_in_a_result(which in 0usize..4, flips in prop::collection::vec((any::<prop::sample::Index>(), 0u8..8), 0..4), end: prop::sample::Index) {
        damaged(which, &flips, end);
    }
}
