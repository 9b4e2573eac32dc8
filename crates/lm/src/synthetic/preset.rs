//! The shapes of known models, from their published configurations.

/// How a model's decoder is put together. What is 0, `None` or `false` is not there.
#[derive(Clone, Debug)]
pub(super) struct Preset {
    pub name: &'static str,
    pub architecture: &'static str,
    pub layers: usize,
    pub width: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_len: usize,
    /// Of the dense feed-forward network.
    pub hidden: usize,
    pub vocabulary: usize,
    pub context: usize,
    pub epsilon: f32,
    pub rope_base: f32,
    pub rope: Rope,
    /// The last layer is the table of embeddings.
    pub tied: bool,
    pub qkv_bias: bool,
    /// Queries, keys and values in one matrix.
    pub fused_qkv: bool,
    /// Gate and up in one matrix.
    pub fused_gate: bool,
    pub head_norm: HeadNorm,
    /// Norms after each half of a layer.
    pub post_norms: bool,
    /// Norms, the attention's output and the logits have biases.
    pub biases: bool,
    pub window: usize,
    pub softcaps: Option<[f32; 2]>,
    /// Of embeddings (0: by the root of the width), residuals, attention and the divisor of logits.
    pub scales: Option<[f32; 4]>,
    pub compressed: Option<Compressed>,
    pub experts: Option<Experts>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Rope {
    Plain,
    /// Llama 3: angles are divided by factors that the file lists.
    Llama3 {
        factor: f32,
        original: usize,
    },
    /// LongRoPE: one list of factors for contexts up to the original one, another for longer ones.
    Long {
        original: usize,
        magnitude: f32,
    },
    Yarn {
        factor: f32,
        original: usize,
        log_multiplier: f32,
    },
    /// Positions are a table of embeddings.
    Learned,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum HeadNorm {
    None,
    Each,
    Together,
}

/// Multi-head latent attention.
#[derive(Clone, Copy, Debug)]
pub(super) struct Compressed {
    pub rank: usize,
    /// Elements of a key that are not turned, and those that are.
    pub plain: usize,
    pub turned: usize,
    pub value_len: usize,
    /// The matrices of keys and values are stored apart, so that caches hold the compressed row.
    pub absorbed: bool,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Experts {
    pub count: usize,
    pub used: usize,
    pub hidden: usize,
    /// Of the expert that all tokens pass; 0: there is none.
    pub shared: usize,
    pub shared_gate: bool,
    pub leading_dense: usize,
    /// `expert_gating_func`; 0: not said.
    pub gating: u32,
}

const EXPERTS: Experts =
    Experts { count: 0, used: 0, hidden: 0, shared: 0, shared_gate: false, leading_dense: 0, gating: 0 };

const BASE: Preset = Preset {
    name: "",
    architecture: "llama",
    layers: 0,
    width: 0,
    heads: 0,
    kv_heads: 0,
    head_len: 0,
    hidden: 0,
    vocabulary: 0,
    context: 4096,
    epsilon: 1e-5,
    rope_base: 10_000.0,
    rope: Rope::Plain,
    tied: false,
    qkv_bias: false,
    fused_qkv: false,
    fused_gate: false,
    head_norm: HeadNorm::None,
    post_norms: false,
    biases: false,
    window: 0,
    softcaps: None,
    scales: None,
    compressed: None,
    experts: None,
};

const QWEN3: Preset = Preset {
    architecture: "qwen3",
    head_len: 128,
    vocabulary: 151_936,
    context: 40_960,
    epsilon: 1e-6,
    rope_base: 1e6,
    head_norm: HeadNorm::Each,
    ..BASE
};

const GEMMA: Preset = Preset {
    architecture: "gemma",
    head_len: 256,
    vocabulary: 256_000,
    context: 8192,
    epsilon: 1e-6,
    tied: true,
    ..BASE
};

const DEEPSEEK_V2_LITE: Preset = Preset {
    name: "deepseek-v2-lite",
    architecture: "deepseek2",
    layers: 27,
    width: 2048,
    heads: 16,
    kv_heads: 16,
    head_len: 192,
    hidden: 10_944,
    vocabulary: 102_400,
    context: 163_840,
    epsilon: 1e-6,
    rope: Rope::Yarn { factor: 40.0, original: 4096, log_multiplier: 0.0707 },
    compressed: Some(Compressed { rank: 512, plain: 128, turned: 64, value_len: 128, absorbed: true }),
    experts: Some(Experts { count: 64, used: 6, hidden: 1408, shared: 2816, leading_dense: 1, ..EXPERTS }),
    ..BASE
};

const SMALLTHINKER: Preset = Preset {
    architecture: "smallthinker",
    head_len: 128,
    vocabulary: 151_936,
    epsilon: 1e-6,
    rope_base: 1.5e6,
    ..BASE
};

/// All of them, mixtures of experts first.
pub(super) const PRESETS: [Preset; 24] = [
    Preset {
        name: "qwen3-30b-a3b",
        architecture: "qwen3moe",
        layers: 48,
        width: 2048,
        heads: 32,
        kv_heads: 4,
        hidden: 6144,
        experts: Some(Experts { count: 128, used: 8, hidden: 768, ..EXPERTS }),
        ..QWEN3
    },
    Preset {
        name: "qwen2-57b-a14b",
        architecture: "qwen2moe",
        layers: 28,
        width: 3584,
        heads: 28,
        kv_heads: 4,
        head_len: 128,
        hidden: 18_944,
        vocabulary: 151_936,
        context: 32_768,
        epsilon: 1e-6,
        rope_base: 1e6,
        qkv_bias: true,
        experts: Some(Experts {
            count: 64,
            used: 8,
            hidden: 2560,
            shared: 20_480,
            shared_gate: true,
            ..EXPERTS
        }),
        ..BASE
    },
    Preset {
        name: "qwen1.5-moe-a2.7b",
        architecture: "qwen2moe",
        layers: 24,
        width: 2048,
        heads: 16,
        kv_heads: 16,
        head_len: 128,
        hidden: 5632,
        vocabulary: 151_936,
        context: 8192,
        epsilon: 1e-6,
        rope_base: 1e6,
        qkv_bias: true,
        experts: Some(Experts {
            count: 60,
            used: 4,
            hidden: 1408,
            shared: 5632,
            shared_gate: true,
            ..EXPERTS
        }),
        ..BASE
    },
    Preset {
        name: "mixtral-8x7b",
        layers: 32,
        width: 4096,
        heads: 32,
        kv_heads: 8,
        head_len: 128,
        hidden: 14_336,
        vocabulary: 32_000,
        context: 32_768,
        rope_base: 1e6,
        experts: Some(Experts { count: 8, used: 2, hidden: 14_336, ..EXPERTS }),
        ..BASE
    },
    Preset {
        name: "olmoe-1b-7b",
        architecture: "olmoe",
        layers: 16,
        width: 2048,
        heads: 16,
        kv_heads: 16,
        head_len: 128,
        hidden: 1024,
        vocabulary: 50_304,
        head_norm: HeadNorm::Together,
        experts: Some(Experts { count: 64, used: 8, hidden: 1024, ..EXPERTS }),
        ..BASE
    },
    Preset {
        name: "granite-3b-a800m",
        architecture: "granitemoe",
        layers: 32,
        width: 1536,
        heads: 24,
        kv_heads: 8,
        head_len: 64,
        hidden: 512,
        vocabulary: 49_155,
        epsilon: 1e-6,
        tied: true,
        scales: Some([12.0, 0.22, 0.015_625, 6.0]),
        experts: Some(Experts { count: 40, used: 8, hidden: 512, ..EXPERTS }),
        ..BASE
    },
    DEEPSEEK_V2_LITE,
    // The same model as older files have it: keys and values of each head in the cache.
    Preset {
        name: "deepseek-v2-lite-expanded",
        compressed: Some(Compressed { rank: 512, plain: 128, turned: 64, value_len: 128, absorbed: false }),
        ..DEEPSEEK_V2_LITE
    },
    Preset {
        name: "phi-3.5-moe",
        architecture: "phimoe",
        layers: 32,
        width: 4096,
        heads: 32,
        kv_heads: 8,
        head_len: 128,
        hidden: 6400,
        vocabulary: 32_064,
        context: 131_072,
        rope: Rope::Long { original: 4096, magnitude: 1.190_238 },
        qkv_bias: true,
        biases: true,
        experts: Some(Experts { count: 16, used: 2, hidden: 6400, ..EXPERTS }),
        ..BASE
    },
    Preset {
        name: "smallthinker-4b-a0.6b",
        layers: 32,
        width: 1536,
        heads: 12,
        kv_heads: 2,
        hidden: 768,
        context: 32_768,
        tied: true,
        experts: Some(Experts { count: 32, used: 4, hidden: 768, gating: 2, ..EXPERTS }),
        ..SMALLTHINKER
    },
    Preset {
        name: "smallthinker-21b-a3b",
        layers: 52,
        width: 2560,
        heads: 28,
        kv_heads: 4,
        hidden: 768,
        context: 16_384,
        window: 4096,
        experts: Some(Experts { count: 64, used: 6, hidden: 768, gating: 2, ..EXPERTS }),
        ..SMALLTHINKER
    },
    Preset {
        name: "llama-3.2-1b",
        layers: 16,
        width: 2048,
        heads: 32,
        kv_heads: 8,
        head_len: 64,
        hidden: 8192,
        vocabulary: 128_256,
        context: 131_072,
        rope_base: 500_000.0,
        rope: Rope::Llama3 { factor: 32.0, original: 8192 },
        tied: true,
        ..BASE
    },
    Preset {
        name: "mistral-7b",
        layers: 32,
        width: 4096,
        heads: 32,
        kv_heads: 8,
        head_len: 128,
        hidden: 14_336,
        vocabulary: 32_768,
        context: 32_768,
        rope_base: 1e6,
        ..BASE
    },
    Preset {
        name: "smollm2-135m",
        layers: 30,
        width: 576,
        heads: 9,
        kv_heads: 3,
        head_len: 64,
        hidden: 1536,
        vocabulary: 49_152,
        context: 8192,
        rope_base: 100_000.0,
        tied: true,
        ..BASE
    },
    Preset {
        name: "qwen2.5-0.5b",
        architecture: "qwen2",
        layers: 24,
        width: 896,
        heads: 14,
        kv_heads: 2,
        head_len: 64,
        hidden: 4864,
        vocabulary: 151_936,
        context: 32_768,
        epsilon: 1e-6,
        rope_base: 1e6,
        tied: true,
        qkv_bias: true,
        ..BASE
    },
    Preset {
        name: "qwen3-0.6b",
        layers: 28,
        width: 1024,
        heads: 16,
        kv_heads: 8,
        hidden: 3072,
        tied: true,
        ..QWEN3
    },
    Preset { name: "gemma-2b", layers: 18, width: 2048, heads: 8, kv_heads: 1, hidden: 16_384, ..GEMMA },
    Preset {
        name: "gemma-2-2b",
        architecture: "gemma2",
        layers: 26,
        width: 2304,
        heads: 8,
        kv_heads: 4,
        hidden: 9216,
        post_norms: true,
        window: 4096,
        softcaps: Some([50.0, 30.0]),
        ..GEMMA
    },
    Preset {
        name: "gemma-3-270m",
        architecture: "gemma3",
        layers: 18,
        width: 640,
        heads: 4,
        kv_heads: 1,
        hidden: 2048,
        vocabulary: 262_144,
        context: 32_768,
        rope_base: 1e6,
        head_norm: HeadNorm::Each,
        post_norms: true,
        window: 512,
        ..GEMMA
    },
    Preset {
        name: "gemma-3-1b",
        architecture: "gemma3",
        layers: 26,
        width: 1152,
        heads: 4,
        kv_heads: 1,
        hidden: 6912,
        vocabulary: 262_144,
        context: 32_768,
        rope_base: 1e6,
        head_norm: HeadNorm::Each,
        post_norms: true,
        window: 512,
        ..GEMMA
    },
    Preset {
        name: "phi-3-mini",
        architecture: "phi3",
        layers: 32,
        width: 3072,
        heads: 32,
        kv_heads: 32,
        head_len: 96,
        hidden: 8192,
        vocabulary: 32_064,
        context: 131_072,
        rope: Rope::Long { original: 4096, magnitude: 1.190_238 },
        fused_qkv: true,
        fused_gate: true,
        window: 262_144,
        ..BASE
    },
    Preset {
        name: "gpt2",
        architecture: "gpt2",
        layers: 12,
        width: 768,
        heads: 12,
        kv_heads: 12,
        head_len: 64,
        hidden: 3072,
        vocabulary: 50_257,
        context: 1024,
        rope: Rope::Learned,
        tied: true,
        qkv_bias: true,
        fused_qkv: true,
        biases: true,
        ..BASE
    },
    Preset {
        name: "granite-2b",
        architecture: "granite",
        layers: 40,
        width: 2048,
        heads: 32,
        kv_heads: 8,
        head_len: 64,
        hidden: 8192,
        vocabulary: 49_155,
        tied: true,
        scales: Some([12.0, 0.22, 0.015_625, 8.0]),
        ..BASE
    },
    Preset {
        name: "granite-3.1-1b-a400m",
        architecture: "granitemoe",
        layers: 24,
        width: 1024,
        heads: 16,
        kv_heads: 8,
        head_len: 64,
        hidden: 512,
        vocabulary: 49_155,
        epsilon: 1e-6,
        tied: true,
        context: 131_072,
        rope_base: 1.5e6,
        scales: Some([12.0, 0.22, 0.015_625, 6.0]),
        experts: Some(Experts { count: 32, used: 8, hidden: 512, ..EXPERTS }),
        ..BASE
    },
];

impl Preset {
    /// The same structure at the size of a toy: as many kinds of layers, heads that share keys and values as before.
    pub fn tiny(mut self) -> Preset {
        let hidden = self.hidden;
        let ratio = self.heads / self.kv_heads;
        let shared = match ratio {
            0..=4 => ratio,
            // An odd ratio stays odd.
            _ if ratio % 2 == 1 => 3,
            _ => 4,
        };
        // A width that is not the heads together stays so.
        let even = self.heads * self.head_len == self.width;
        self.kv_heads = if ratio == 1 { 4 } else { self.kv_heads.min(2) };
        self.heads = self.kv_heads * shared;
        self.head_len = if even { 32 } else { 64 };
        self.width = if even { self.heads * 32 } else { 128 };
        self.hidden = 192;
        self.vocabulary = 320;
        self.context = 512;
        self.layers = match self.architecture {
            "gemma3" => 7,
            "smallthinker" => 6,
            "gemma2" => 4,
            _ => 3,
        };
        if self.architecture.starts_with("gemma") {
            self.window = self.window.min(24);
        }
        if self.softcaps.is_some() {
            self.softcaps = Some([2.0, 5.0]);
        }
        match &mut self.rope {
            Rope::Llama3 { original, .. } | Rope::Yarn { original, .. } => *original = 64,
            Rope::Long { original, .. } => *original = 256,
            Rope::Plain | Rope::Learned => {}
        }
        if let Some(c) = &mut self.compressed {
            *c = Compressed { rank: 64, plain: 32, turned: 16, value_len: 32, ..*c };
            self.head_len = 48;
            self.width = 128;
        }
        if let Some(e) = &mut self.experts {
            let shared = match e.shared {
                0 => 0,
                // Where it has no gate, it is as wide as so many experts.
                _ if e.shared_gate => 160,
                _ => 2 * 96,
            };
            // Some architectures have one key for both.
            if e.hidden == hidden {
                self.hidden = 96;
            }
            *e = Experts { count: e.count.min(8), used: e.used.min(3), hidden: 96, shared, ..*e };
        }
        self
    }
}
