import Foundation

/// What computes logits for the generation loop: the processor, Core ML, or a script in a test.
///
/// A backend keeps one sequence and one adapter at a time. The engine calls it from one place after
/// another, never from two at once.
public protocol TokenBackend: Sendable {
    /// What it is and what it can hold; the same for its whole life.
    var facts: BackendFacts { get }

    /// Loads what is not loaded; nothing where everything is.
    ///
    /// - Parameter report: is told what goes on.
    func load(_ report: @escaping @Sendable (LoadEvent) -> Void) async throws

    /// The logits after the last of all ids, one for each row of the embedding.
    ///
    /// What was read for the call before is used again as far as the ids are the same and the adapter
    /// is. Between two blocks of a long prompt it looks whether its task is cancelled.
    ///
    /// - Parameters:
    ///   - ids: all of the sequence, at least one id and at most as many as the context has.
    ///   - adapter: what is to be on the model; `nil`: the base.
    /// - Throws: `Phi3Error`, or `CancellationError`.
    func logits(after ids: [Int32], adapter: BoundAdapter?) async throws -> [Float]

    /// Gives memory back. `load` brings it again.
    func unload() async

    /// Writes the model with an adapter to a new place.
    ///
    /// - Parameters:
    ///   - url: the file or folder to write; it appears complete or not at all.
    ///   - adapter: what is on the model; `nil`: the base.
    ///   - replace: whether what is there is replaced.
    func save(_ url: URL, adapter: BoundAdapter?, replace: Bool) async throws
}

/// What a backend is and what it can hold.
public struct BackendFacts: Sendable {
    /// How adapters reach the model.
    public enum AdapterSupport: Sendable, Equatable {
        /// Any adapter that fits the base.
        case any
        /// Those built in, by name.
        case builtIn([String])
        /// None, and why.
        case none(String)
    }

    /// Its name: "reference" or "core-ml".
    public var name: String
    /// Tokens of conversation and note together.
    public var contextLength: Int
    /// Rows of the embedding, which is how many logits there are.
    public var vocabularyRows: Int
    /// How adapters reach the model.
    public var adapterSupport: AdapterSupport
    /// What adapters are checked against.
    public var target: AdapterTarget
    /// The base where its weights lie on this machine as a checkpoint.
    public var checkpoint: Checkpoint?
    /// Bytes it needs.
    public var memory: MemoryNeeds

    /// Makes facts.
    public init(
        name: String, contextLength: Int, vocabularyRows: Int, adapterSupport: AdapterSupport,
        target: AdapterTarget, checkpoint: Checkpoint? = nil, memory: MemoryNeeds
    ) {
        self.name = name
        self.contextLength = contextLength
        self.vocabularyRows = vocabularyRows
        self.adapterSupport = adapterSupport
        self.target = target
        self.checkpoint = checkpoint
        self.memory = memory
    }
}

/// Which adapter it is: a name for people and a hash for the machine.
public struct AdapterID: Sendable, Hashable, CustomStringConvertible {
    /// Its name in the bundle, or its file's.
    public let name: String
    /// SHA-256 of what decides its effect, or what the manifest says of one that is built in.
    public let sha256: String

    /// Makes an id.
    public init(name: String, sha256: String) {
        self.name = name
        self.sha256 = sha256
    }

    /// The name.
    public var description: String { name }
}

/// An adapter that was checked and may be put on a model.
public struct BoundAdapter: Sendable {
    /// Which one it is. Keys and values made under another are not used again.
    public let id: AdapterID
    /// Its changes; `nil` for one that is built into the package.
    public let adapter: Adapter?
    /// "prefill" and "decode" -> the functions it is built into; empty for one with changes.
    public let functions: [String: String]

    /// Makes one that was checked.
    public init(id: AdapterID, adapter: Adapter?, functions: [String: String] = [:]) {
        self.id = id
        self.adapter = adapter
        self.functions = functions
    }
}
