import Foundation
import Phi3Core

/// Phi-3 on the processor alone, in single precision: for demo-size models, tests, and as the measure
/// of every other backend. Logits equal those of transformers.
///
/// A model is a value. Putting an adapter on gives a new one that shares the base's weights; taking it
/// off gives back the base, whose logits are the same bits as before.
public struct ReferenceModel: Sendable {
    /// How a checkpoint is loaded.
    public struct Options: Sendable {
        /// Weights that need no more than this many bytes in single precision are decoded once;
        /// larger models keep them as stored and decode rows whenever they are used.
        public var expandedBytes: Int

        /// The usual limit is half a gigabyte.
        public init(expandedBytes: Int = 512 << 20) { self.expandedBytes = expandedBytes }
    }

    /// The checkpoint the weights come from.
    public let checkpoint: Checkpoint
    /// Which base it is.
    public let fingerprint: Fingerprint
    /// The adapter that is on it; `nil`: none.
    public private(set) var adapter: Adapter?
    /// Whether the adapter is folded into the weights.
    public private(set) var isFused = false

    /// The architecture.
    public var config: ModelConfig { checkpoint.config }

    var embedding: Linear
    var head: Linear?
    var blocks: [Block]
    var lastNorm: [Float]

    /// One block's weights.
    struct Block: Sendable {
        var projections: [Projected]
        var inputNorm: [Float]
        var innerNorm: [Float]

        subscript(projection: Projection) -> Projected {
            get { projections[projection.rawValue] }
            set { projections[projection.rawValue] = newValue }
        }
    }

    /// Loads a checkpoint folder or a single-file model.
    ///
    /// - Parameters:
    ///   - url: the folder or file.
    ///   - options: how it is loaded.
    /// - Throws: `Phi3Error`: anything missing, damaged, or not what `config.json` says.
    public static func load(
        _ url: URL, options: Options = Options()
    ) throws -> ReferenceModel {
        try ReferenceModel(try Checkpoint.open(url), options: options)
    }

    /// The model of an opened checkpoint.
    public init(_ checkpoint: Checkpoint, options: Options = Options()) throws {
        let config = checkpoint.config
        let numbers = ReferenceModel.weightCount(config)
        let expanded = numbers <= options.expandedBytes / 4
        func linear(_ name: String) throws -> Linear {
            guard let matrix = WeightMatrix(checkpoint, layer: name) else {
                throw ReferenceModel.missing(checkpoint, name)
            }
            return Linear(matrix, expanded: expanded)
        }
        func norm(_ name: String) throws -> [Float] {
            guard let tensor = checkpoint.tensor("\(name).weight") else {
                throw ReferenceModel.missing(checkpoint, name)
            }
            return tensor.floats()
        }
        embedding = try linear("model.embed_tokens")
        head = config.tiesEmbeddings ? nil : try linear("lm_head")
        lastNorm = try norm("model.norm")
        blocks = try (0..<config.layerCount).map { layer in
            let projections = try Projection.allCases.map { projection in
                let site = ProjectionSite(layer: layer, projection: projection)
                return Projected(linear: try linear(site.name))
            }
            return Block(
                projections: projections,
                inputNorm: try norm("model.layers.\(layer).input_layernorm"),
                innerNorm: try norm("model.layers.\(layer).post_attention_layernorm"))
        }
        self.checkpoint = checkpoint
        fingerprint = Fingerprint(of: checkpoint)
    }

    /// What adapters for this model are checked against.
    public var target: AdapterTarget { AdapterTarget(checkpoint, fingerprint: fingerprint) }

    /// Numbers in all weights.
    private static func weightCount(_ config: ModelConfig) -> Int {
        let block = Projection.allCases.reduce(0) {
            let shape = config.shape(of: $1)
            return $0 + shape.outputs * shape.inputs
        }
        return block * config.layerCount + config.vocabSize * config.hiddenSize * 2
    }

    private static func missing(_ checkpoint: Checkpoint, _ name: String) -> Phi3Error {
        .checkpoint(
            ErrorDetails(
                place: checkpoint.url.path, found: "no weight \(name)",
                expected: "all of the model's",
                advice: "Fetch the model again."))
    }
}

// MARK: - Adapters

extension ReferenceModel {
    /// The model with an adapter from a file or folder beside its weights.
    ///
    /// - Parameters:
    ///   - url: the single file that training writes, a slot pack, or a folder of mlx-lm or PEFT.
    ///   - options: what is accepted that would otherwise be refused.
    /// - Throws: `Phi3Error` with everything that speaks against it; the model is as it was.
    public func applyLoRA(
        _ url: URL, options: AdapterOptions = AdapterOptions()
    ) throws -> ReferenceModel {
        try checkBare()
        let adapter = try Adapter.load(url, for: target, base: checkpoint, options: options)
        return try applying(adapter, options: options)
    }

    /// The model with an adapter beside its weights; an adapter that is on it already is replaced.
    ///
    /// - Parameters:
    ///   - adapter: an adapter that was read.
    ///   - options: what is accepted that would otherwise be refused.
    public func applying(
        _ adapter: Adapter, options: AdapterOptions = AdapterOptions()
    ) throws -> ReferenceModel {
        try checkBare()
        let problems = adapter.problems(on: target, options: options)
        if !problems.isEmpty {
            throw Phi3Error.adapterIncompatible(
                ProblemList(
                    path: adapter.url.path, what: "does not fit this model", problems: problems,
                    advice: "Load the base it was trained on."))
        }
        var adapted = removingLoRA()
        for (site, change) in adapter.changes {
            let linear = adapted.blocks[site.layer][site.projection].linear
            adapted.blocks[site.layer][site.projection].change = SideChange(
                change, scale: adapter.scaling.scale, base: linear)
        }
        let origin = Adapter.Origin(
            baseName: checkpoint.url.lastPathComponent, baseFingerprint: fingerprint,
            baseQuantization: config.quantization?.section.object)
        adapted.adapter = adapter.described(layerCount: config.layerCount, base: origin)
        return adapted
    }

    /// The bare base. A fused model has no base any more and stays as it is.
    public func removingLoRA() -> ReferenceModel {
        if isFused { return self }
        var bare = self
        for layer in bare.blocks.indices {
            for projection in Projection.allCases { bare.blocks[layer][projection].change = nil }
        }
        bare.adapter = nil
        return bare
    }

    /// The model with its adapter folded into the weights, in single precision.
    public func fused() -> ReferenceModel {
        guard let adapter, !isFused else { return self }
        var fused = self
        for (site, change) in adapter.changes {
            let linear = blocks[site.layer][site.projection].linear
            fused.blocks[site.layer][site.projection] = Projected(
                linear: SideChange.adapted(linear, change, scale: adapter.scaling.scale))
        }
        fused.isFused = true
        return fused
    }

    /// The model with the numbers of adapter slots beside its weights, exactly as a package with
    /// slots computes it. Slots of zeros are the base.
    ///
    /// - Parameter slots: all eight, e.g. from `AdapterSlots`.
    /// - Throws: `Phi3Error` where a slot is missing or has another shape.
    public func applying(slots: [String: (shape: [Int], values: [Float])]) throws -> ReferenceModel
    {
        try checkBare()
        var adapted = removingLoRA()
        for projection in Projection.allCases {
            let shape = config.shape(of: projection)
            guard let a = slots["loraA_\(projection.module)"],
                let b = slots["loraB_\(projection.module)"],
                a.shape.count == 3, b.shape.count == 3, a.shape[0] == config.layerCount,
                b.shape[0] == config.layerCount, a.shape[2] == shape.inputs,
                b.shape[1] == shape.outputs, a.shape[1] == b.shape[2],
                a.values.count == a.shape.reduce(1, *), b.values.count == b.shape.reduce(1, *)
            else {
                throw Phi3Error.input(
                    ErrorDetails(
                        place: "slots of \(projection.module)",
                        found: "missing, or of another shape",
                        expected: "(layers, rank, in) and (layers, out, rank) of this model",
                        advice: "Fill the slots from an adapter of this bundle."))
            }
            let rank = a.shape[1]
            let wide = rank * shape.inputs
            let tall = shape.outputs * rank
            for layer in 0..<config.layerCount {
                let rows = Array(a.values[layer * wide..<(layer + 1) * wide])
                let columns = Array(b.values[layer * tall..<(layer + 1) * tall])
                if rows.allSatisfy({ $0 == 0 }) || columns.allSatisfy({ $0 == 0 }) { continue }
                let change = LowRank(
                    a: Tensor(rows, shape: [rank, shape.inputs]).transposed(),
                    b: Tensor(columns, shape: [shape.outputs, rank]).transposed(), m: nil)
                let linear = adapted.blocks[layer][projection].linear
                adapted.blocks[layer][projection].change = SideChange(
                    change, scale: 1, base: linear)
            }
        }
        return adapted
    }

    private func checkBare() throws {
        if isFused {
            throw Phi3Error.adapterIncompatible(
                ProblemList(
                    path: checkpoint.url.path, what: "cannot take another adapter",
                    problems: ["an adapter is folded into its weights already"],
                    advice: "Apply the adapter to the base."))
        }
    }
}
