import Foundation
import Phi3Core

/// The processor as a backend: computes with a checkpoint, or with the weights in a bundle's package.
///
/// It works on a queue of its own. Logits are those of `ReferenceModel`, in single precision.
public actor ReferenceBackend: TokenBackend {
    /// Where the weights are.
    private enum Source: Sendable {
        case checkpoint(Checkpoint)
        case bundle(ModelBundle)
    }

    /// What it is and what it can hold.
    public nonisolated let facts: BackendFacts
    private nonisolated let queue = SerialQueue("MedPhiKit.reference")
    private let source: Source
    private let options: ReferenceModel.Options
    private var base: ReferenceModel?
    /// One sequence, and the adapter it was read under.
    private var session: (id: AdapterID?, sequence: ReferenceSession)?

    /// The queue.
    public nonisolated var unownedExecutor: UnownedSerialExecutor {
        queue.asUnownedSerialExecutor()
    }

    /// A backend for a checkpoint; no weight is read yet.
    ///
    /// - Parameters:
    ///   - checkpoint: an opened checkpoint.
    ///   - context: the most tokens of a sequence; `nil`: as many as the model was made for.
    ///   - options: how the weights are loaded.
    /// - Throws: `Phi3Error.option`: no tokens.
    public init(
        _ checkpoint: Checkpoint, context: Int? = nil,
        options: ReferenceModel.Options = .init()
    ) throws {
        let config = checkpoint.config
        let target = AdapterTarget(checkpoint, fingerprint: Fingerprint(of: checkpoint))
        facts = BackendFacts(
            name: ReferenceBackend.name,
            contextLength: try ReferenceBackend.limit(context, config.maxPositions),
            vocabularyRows: config.vocabSize, adapterSupport: .any, target: target,
            checkpoint: checkpoint,
            memory: ReferenceBackend.memory(config, checkpoint.byteCount, options))
        source = .checkpoint(checkpoint)
        self.options = options
    }

    /// A backend for a bundle alone; no weight is read yet.
    ///
    /// - Parameters:
    ///   - bundle: an opened bundle.
    ///   - context: the most tokens of a sequence; `nil`: as many as its package holds.
    ///   - options: how the weights are loaded.
    /// - Throws: `Phi3Error`: no tokens, or a manifest that describes no Phi-3.
    public init(
        _ bundle: ModelBundle, context: Int? = nil,
        options: ReferenceModel.Options = .init()
    ) throws {
        let manifest = bundle.manifest
        let config = try ModelConfig(manifest, place: bundle.place(Manifest.fileName).path)
        let longest = min(manifest.medphi.coreml.contextLength, config.maxPositions)
        facts = BackendFacts(
            name: ReferenceBackend.name,
            contextLength: try ReferenceBackend.limit(context, longest),
            vocabularyRows: config.vocabSize,
            adapterSupport: ReferenceBackend.support(manifest.medphi.adapters),
            target: AdapterTarget(manifest),
            memory: ReferenceBackend.memory(config, manifest.medphi.memory.weights, options))
        source = .bundle(bundle)
        self.options = options
    }

    /// What `BackendFacts.name` says.
    public static let name = "reference"

    /// Reads the weights.
    public func load(_ report: @escaping @Sendable (LoadEvent) -> Void) throws {
        _ = try loaded(report)
    }

    /// The logits after a sequence; see `TokenBackend`.
    public func logits(after ids: [Int32], adapter: BoundAdapter?) throws -> [Float] {
        guard ids.count <= facts.contextLength else {
            throw Phi3Error.contextOverflow(
                ErrorDetails(
                    place: "sequence", found: "\(ids.count) tokens",
                    expected: "at most \(facts.contextLength)",
                    advice: "Shorten the conversation, or allow fewer tokens for the note."))
        }
        var sequence: ReferenceSession
        if let session, session.id == adapter?.id {
            sequence = session.sequence
        } else {
            sequence = ReferenceSession(try adapted(adapter))
        }
        // Two owners of the cache would copy all of it at the first write.
        session = nil
        defer { session = (adapter?.id, sequence) }
        return try sequence.logits(after: ids)
    }

    /// Gives the weights and the sequence back.
    public func unload() {
        base = nil
        session = nil
    }

    /// Writes the model with an adapter: a checkpoint with it folded in, a bundle with it added.
    public func save(_ url: URL, adapter: BoundAdapter?, replace: Bool) throws {
        switch source {
        case .checkpoint:
            let model = try adapted(adapter)
            let isPacked = model.checkpoint?.quantizedLayers.isEmpty == false
            // A change is smaller than the steps of a quantised weight's grid.
            try model.save(
                url, precision: adapter != nil && isPacked ? .half : .same, replace: replace)
        case .bundle(let bundle):
            try bundle.copy(to: url, adding: adapter, replace: replace)
        }
    }

    private func loaded(
        _ report: @Sendable (LoadEvent) -> Void = { _ in }
    ) throws -> ReferenceModel {
        if let base { return base }
        report(.loading)
        let model =
            switch source {
            case .checkpoint(let checkpoint): try ReferenceModel(checkpoint, options: options)
            case .bundle(let bundle): try ReferenceModel(bundle, options: options)
            }
        base = model
        return model
    }

    private func adapted(_ adapter: BoundAdapter?) throws -> ReferenceModel {
        let model = try loaded()
        guard let adapter else { return model }
        if let changes = adapter.adapter {
            // What was accepted when it was bound is not asked again.
            let options = AdapterOptions(allowsUnstatedBase: true, allowsOtherBase: true)
            return try model.applying(changes, options: options)
        }
        guard case .bundle(let bundle) = source else {
            throw Phi3Error.adapterIncompatible(
                ProblemList(
                    path: adapter.id.name, what: "cannot be put on this model",
                    problems: ["it is built into a package, and this is a checkpoint"],
                    advice: "Give the adapter's file."))
        }
        return try model.applying(builtIn: adapter.id.name, of: bundle)
    }

    private static func limit(_ context: Int?, _ longest: Int) throws -> Int {
        guard let context else { return longest }
        guard context > 0 else {
            throw Phi3Error.option(
                ErrorDetails(
                    place: "context", found: "\(context)", expected: "1 token or more",
                    advice: "Leave it out to take all the model has."))
        }
        return min(context, longest)
    }

    private static func support(_ adapters: Manifest.Adapters) -> BackendFacts.AdapterSupport {
        switch adapters.mode {
        case .slots, .none: .any
        case .functions: .builtIn(adapters.list.map(\.name))
        case .fused: .none("an adapter is folded into its weights")
        }
    }

    private static func memory(
        _ config: ModelConfig, _ stored: Int, _ options: ReferenceModel.Options
    ) -> MemoryNeeds {
        let single = MemoryLayout<Float>.size
        let isExpanded = ReferenceModel.isExpanded(config, options)
        return MemoryNeeds(
            weights: isExpanded ? ReferenceModel.weightCount(config) * single : stored,
            keyValuePerToken: 2 * config.layerCount * config.keyValueWidth * single)
    }
}
