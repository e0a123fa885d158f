/// Which tensors a Phi-3 of a given shape consists of, plain or quantised by MLX.
enum Layout {
    /// A tensor's shape and the kinds it may have.
    struct Form {
        let shape: [Int]
        let types: [TensorType]

        var description: String {
            "\(Layout.shown(shape)) \(types.map(\.rawValue).joined(separator: " or "))"
        }
    }

    static let floats: [TensorType] = [.f32, .f16, .bf16]

    /// A shape as Python shows it: `(2, 3)`, `(2,)`, `()`.
    static func shown(_ shape: [Int]) -> String {
        let items = shape.map(String.init).joined(separator: ", ")
        return shape.count == 1 ? "(\(items),)" : "(\(items))"
    }
}

extension ModelConfig {
    /// (outputs, inputs) of a projection.
    public func shape(of projection: Projection) -> (outputs: Int, inputs: Int) {
        switch projection {
        case .qkv: return (queryWidth + 2 * keyValueWidth, hiddenSize)
        case .o: return (hiddenSize, queryWidth)
        case .gateUp: return (2 * intermediateSize, hiddenSize)
        case .down: return (hiddenSize, intermediateSize)
        }
    }

    /// (outputs, inputs) of every layer that can be quantised: embedding, head and projections.
    func linearShapes() -> [(name: String, outputs: Int, inputs: Int)] {
        var shapes = [(name: "model.embed_tokens", outputs: vocabSize, inputs: hiddenSize)]
        if !tiesEmbeddings { shapes.append(("lm_head", vocabSize, hiddenSize)) }
        for layer in 0..<layerCount {
            for projection in Projection.allCases {
                let shape = shape(of: projection)
                let site = ProjectionSite(layer: layer, projection: projection)
                shapes.append((site.name, shape.outputs, shape.inputs))
            }
        }
        return shapes
    }

    /// The form of each layer that is stored quantised: as in mlx-lm those that `config.json` names
    /// one by one, and of the others those that have scales.
    func quantizedLayers(_ stored: [String: TensorInfo]) -> [String: AffineQuantization.Form] {
        guard let quantization else { return [:] }
        var layers: [String: AffineQuantization.Form] = [:]
        for (name, _, inputs) in linearShapes() {
            guard let form = quantization.form(of: name), inputs % form.groupSize == 0 else {
                continue
            }
            let packed = stored["\(name).weight"]?.type == .u32
            if packed || stored["\(name).scales"] != nil || quantization.layers[name] != nil {
                layers[name] = form
            }
        }
        return layers
    }

    /// The form of every tensor the model needs; `stored` tells which layers are quantised.
    func expectedTensors(_ stored: [String: TensorInfo]) -> [String: Layout.Form] {
        var expected: [String: Layout.Form] = [:]
        var norms = ["model.norm"]
        for layer in 0..<layerCount {
            norms.append("model.layers.\(layer).input_layernorm")
            norms.append("model.layers.\(layer).post_attention_layernorm")
        }
        for name in norms {
            expected["\(name).weight"] = Layout.Form(shape: [hiddenSize], types: Layout.floats)
        }
        let quantized = quantizedLayers(stored)
        for (name, outputs, inputs) in linearShapes() {
            guard let form = quantized[name] else {
                expected["\(name).weight"] = Layout.Form(
                    shape: [outputs, inputs], types: Layout.floats)
                continue
            }
            expected["\(name).weight"] = Layout.Form(
                shape: [outputs, inputs * form.bits / 32], types: [.u32])
            for part in ["scales", "biases"] {
                expected["\(name).\(part)"] = Layout.Form(
                    shape: [outputs, inputs / form.groupSize], types: Layout.floats)
            }
        }
        return expected
    }
}
