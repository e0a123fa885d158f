extension ModelConfig {
    /// The architecture that a bundle's manifest describes.
    ///
    /// LongRoPE's factors are in the package's tables only: of a LongRoPE model both lists are empty.
    ///
    /// - Parameters:
    ///   - manifest: a manifest that was read.
    ///   - place: its name, for messages.
    /// - Throws: `Phi3Error.manifest` with every number that no Phi-3 has.
    public init(_ manifest: Manifest, place: String = Manifest.fileName) throws {
        let model = manifest.medphi.model
        let rope = model.rope
        let extents = [
            ("vocab_size", model.vocabSize), ("hidden_size", model.hiddenSize),
            ("intermediate_size", model.intermediateSize), ("heads", model.heads),
            ("kv_heads", model.kvHeads), ("head_dim", model.headSize),
            ("max_position_embeddings", model.maxPositions),
            ("sliding_window", model.slidingWindow ?? 1),
            ("rope.switch_length", rope.switchLength ?? 1),
        ]
        var problems = extents.compactMap { name, value in
            (1...ModelConfig.mostWhole).contains(value) ? nil : "medphi.model.\(name) is \(value)"
        }
        if !(1...ModelConfig.mostLayers).contains(model.layers) {
            problems.append("medphi.model.layers is \(model.layers)")
        }
        if problems.isEmpty {
            // Within these bounds no product of two extents leaves 64 bits.
            if model.heads % model.kvHeads != 0
                || model.heads * model.headSize > ModelConfig.mostWhole
                || model.intermediateSize > ModelConfig.mostWhole / 2
            {
                problems.append("medphi.model: heads and widths do not go together")
            }
            if rope.rotarySize < 2 || rope.rotarySize % 2 != 0 || rope.rotarySize > model.headSize {
                problems.append("medphi.model.rope.rotary_dim is \(rope.rotarySize)")
            }
        }
        for (name, value) in [
            ("eps", model.epsilon), ("rope.theta", rope.theta),
            ("rope.attention_factor", rope.attentionFactor),
        ] where !(value > 0 && value.isFinite) {
            problems.append("medphi.model.\(name) is \(value)")
        }
        if (rope.kind == .longrope) != (rope.switchLength != nil && rope.factors != .none) {
            problems.append("medphi.model.rope: type, factors and switch_length do not go together")
        }
        if manifest.language.vocabSize != model.vocabSize {
            problems.append("language.vocab_size is not medphi.model.vocab_size")
        }
        guard problems.isEmpty else {
            throw Phi3Error.manifest(
                ProblemList(
                    path: place, what: "describes no Phi-3", problems: problems,
                    advice: "Export the bundle again."))
        }
        let config = ModelConfig(
            vocabSize: model.vocabSize, hiddenSize: model.hiddenSize,
            intermediateSize: model.intermediateSize, layerCount: model.layers,
            headCount: model.heads, keyValueHeadCount: model.kvHeads, headSize: model.headSize,
            normEpsilon: model.epsilon, maxPositions: model.maxPositions, ropeTheta: rope.theta,
            rotarySize: rope.rotarySize,
            longRoPE: rope.switchLength.map {
                LongRoPE(
                    shortFactor: [], longFactor: [], switchLength: $0,
                    attentionFactor: rope.attentionFactor)
            },
            slidingWindow: model.slidingWindow, tiesEmbeddings: model.tiedEmbeddings,
            quantization: nil)
        guard config.hasPossibleSize else {
            throw Phi3Error.manifest(
                ProblemList(
                    path: place, what: "describes no Phi-3",
                    problems: [
                        "medphi.model: its weights are more than \(ModelConfig.mostWeights)"
                    ],
                    advice: "Export the bundle again."))
        }
        self = config
    }
}

extension ModelConfig {
    /// Numbers in all weights that no Phi-3 comes near: each extent by itself may be possible while
    /// their products leave 64 bits.
    static let mostWeights = 1 << 40

    /// Whether all weights together are at most that many numbers.
    var hasPossibleSize: Bool {
        var count = 0
        func add(_ extents: Int...) {
            let size = extents.reduce(1) { ModelConfig.product($0, $1) }
            count = min(count + size, ModelConfig.mostWeights + 1)
        }
        for projection in Projection.allCases {
            let shape = shape(of: projection)
            add(shape.outputs, shape.inputs, layerCount)
        }
        add(vocabSize, hiddenSize, 2)
        return count <= ModelConfig.mostWeights
    }

    /// The product of two counts, or one more than the most weights where it is larger.
    private static func product(_ one: Int, _ other: Int) -> Int {
        let (product, overflow) = one.multipliedReportingOverflow(by: other)
        return overflow ? mostWeights + 1 : min(product, mostWeights + 1)
    }
}
