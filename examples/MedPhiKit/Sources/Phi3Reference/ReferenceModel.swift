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

    /// The checkpoint the weights come from; `nil`: they come from a bundle's package.
    public let checkpoint: Checkpoint?
    /// The checkpoint or the bundle.
    public let url: URL
    /// The architecture. LongRoPE's factors are not in it where the weights come from a package.
    public let config: ModelConfig
    /// What adapters for this model are checked against.
    public let target: AdapterTarget
    /// Which base it is.
    public let fingerprint: Fingerprint
    /// The adapter that is on it; `nil`: none.
    public internal(set) var adapter: Adapter?
    /// Whether the adapter is folded into the weights.
    public internal(set) var isFused = false

    /// Tokens of the longest sequence it reads.
    public var longest: Int { rotary?.context ?? config.maxPositions }

    /// Tables of rotary angles where they cannot be computed.
    let rotary: RotaryTables?
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
        let fingerprint = Fingerprint(of: checkpoint)
        try self.init(
            checkpoint, url: checkpoint.url, checkpoint: checkpoint,
            target: AdapterTarget(checkpoint, fingerprint: fingerprint), options: options)
    }

    /// The model of a bundle, whose weights are read out of its Core ML package.
    ///
    /// An adapter that was folded in on export is part of the weights; one that is built into the
    /// package is put on with `applying(builtIn:of:)`.
    ///
    /// - Parameters:
    ///   - bundle: an opened bundle.
    ///   - options: how it is loaded.
    /// - Throws: `Phi3Error`: no whole package, or one that is not what the manifest says.
    public init(_ bundle: ModelBundle, options: Options = Options()) throws {
        try self.init(
            try PackageWeights(bundle), url: bundle.url, checkpoint: nil,
            target: AdapterTarget(bundle.manifest), options: options)
        isFused = bundle.manifest.medphi.adapters.mode == .fused
    }

    private init(
        _ source: some WeightSource, url: URL, checkpoint: Checkpoint?, target: AdapterTarget,
        options: Options
    ) throws {
        let config = source.config
        let expanded = ReferenceModel.isExpanded(config, options)
        func linear(_ name: String, _ outputs: Int, _ inputs: Int) throws -> Linear {
            Linear(
                try source.matrix(name, outputs: outputs, inputs: inputs), expanded: expanded)
        }
        func norm(_ name: String) throws -> [Float] {
            try source.vector(name, count: config.hiddenSize)
        }
        let (rows, width) = (config.vocabSize, config.hiddenSize)
        embedding = try linear("model.embed_tokens", rows, width)
        head = config.tiesEmbeddings ? nil : try linear("lm_head", rows, width)
        lastNorm = try norm("model.norm")
        blocks = try (0..<config.layerCount).map { layer in
            let projections = try Projection.allCases.map { projection in
                let site = ProjectionSite(layer: layer, projection: projection)
                let shape = config.shape(of: projection)
                return Projected(linear: try linear(site.name, shape.outputs, shape.inputs))
            }
            return Block(
                projections: projections,
                inputNorm: try norm("model.layers.\(layer).input_layernorm"),
                innerNorm: try norm("model.layers.\(layer).post_attention_layernorm"))
        }
        self.config = config
        self.checkpoint = checkpoint
        self.url = url
        self.target = target
        rotary = source.rotary
        fingerprint = target.fingerprint
    }

    /// Whether weights are decoded once and for all.
    static func isExpanded(_ config: ModelConfig, _ options: Options = Options()) -> Bool {
        weightCount(config) <= options.expandedBytes / 4
    }

    /// Numbers in all weights.
    static func weightCount(_ config: ModelConfig) -> Int {
        let block = Projection.allCases.reduce(0) {
            let shape = config.shape(of: $1)
            return $0 + shape.outputs * shape.inputs
        }
        return block * config.layerCount + config.vocabSize * config.hiddenSize * 2
    }
}
