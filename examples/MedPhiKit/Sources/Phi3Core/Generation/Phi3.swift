import Foundation

/// A Phi-3 that writes clinical notes: a handle on a model in memory, with or without an adapter.
///
/// Handles are values. `applyLoRA` gives a new one that shares the weights; the old one stays the
/// base. Texts of all handles on one model are written one after the other.
///
/// ```swift
/// let base = try await Phi3.load(bundleURL)
/// let model = try await base.applyLoRA("soap")  // an adapter of the bundle, or .file(url)
/// for try await event in model.generateNote(from: conversation) {
///     if case .delta(let text, _) = event { print(text, terminator: "") }
/// }
/// ```
///
/// Not a medical device: a note must be read and corrected by a clinician.
public struct Phi3: Sendable {
    /// What the model is.
    public let info: ModelInfo
    let engine: Engine
    let bundle: ModelBundle?
    let adapter: BoundAdapter?

    /// Makes a handle on a backend; `load` of the package MedPhiKit chooses one by itself.
    ///
    /// - Parameters:
    ///   - backend: what computes.
    ///   - tokenizer: the model's own.
    ///   - info: what it is.
    ///   - bundle: the bundle it comes from, whose adapters can then be asked for by name.
    /// - Throws: `Phi3Error.manifest`: the bundle ends no text, so nothing would stop the model.
    public init(
        backend: any TokenBackend, tokenizer: Tokenizer, info: ModelInfo, bundle: ModelBundle? = nil
    ) throws {
        var stops = Set(tokenizer.stopIDs)
        var suppressed: [ClosedRange<Int32>] = []
        if let padding = tokenizer.paddingIDs(rows: backend.facts.vocabularyRows) {
            suppressed.append(padding)
        }
        if let bundle {
            let generation = bundle.manifest.medphi.generation
            stops.formUnion(generation.stopTokenIDs.compactMap { Int32(exactly: $0) })
            if generation.stopTokenIDs.isEmpty {
                throw Phi3Error.manifest(
                    ProblemList(
                        path: bundle.url.path, what: "names no id that ends a text",
                        problems: ["medphi.generation.stop_token_ids is empty"],
                        advice: "Export the bundle again."))
            }
            for range in generation.suppressRanges {
                guard let low = Int32(exactly: range.lowerBound),
                    let high = Int32(exactly: range.upperBound)
                else { continue }
                suppressed.append(low...high)
            }
        }
        engine = Engine(
            backend: backend, tokenizer: tokenizer, stopIDs: stops, suppressed: suppressed)
        self.info = info
        self.bundle = bundle
        adapter = nil
    }

    init(_ other: Phi3, adapter: BoundAdapter?) {
        info = other.info
        engine = other.engine
        bundle = other.bundle
        self.adapter = adapter
    }

    /// The adapter that is on it; `nil`: the base.
    public var activeAdapter: AdapterID? { adapter?.id }
    /// The adapters of its bundle, by name.
    public var adapters: [String] { info.adapters }
    /// What computes: "reference" or "core-ml".
    public var backendName: String { engine.backend.facts.name }
    /// Tokens of conversation and note together.
    public var contextLength: Int { engine.backend.facts.contextLength }
    /// Its tokenizer.
    public var tokenizer: Tokenizer { engine.tokenizer }
    /// What it is doing.
    public var state: ModelState { engine.board.state }

    /// What it is doing now and from now on; the stream ends when nobody holds the model any more.
    ///
    /// A task that uses the model itself holds it. To watch without holding, take the stream first:
    ///
    /// ```swift
    /// let states = model.states()
    /// Task { for await state in states { show(state) } }
    /// ```
    public func states() -> AsyncStream<ModelState> { engine.board.states() }

    /// Whether it fits into memory.
    ///
    /// - Parameters:
    ///   - context: tokens; `nil`: those it has.
    ///   - available: bytes this process may still take; `nil`: not known.
    public func plan(
        context: Int? = nil, available: Int? = SystemMemory.available()
    ) -> MemoryPlan {
        MemoryPlan(
            engine.backend.facts.memory, context: context ?? contextLength, available: available)
    }

    /// Brings the model into memory; nothing where it is. The first text does that by itself.
    ///
    /// - Parameter progress: is told what goes on.
    /// - Throws: `Phi3Error`.
    public func load(
        progress: (@Sendable (LoadEvent) -> Void)? = nil
    ) async throws {
        try await engine.load(progress ?? { _ in })
    }

    /// Makes everything that is made at first use, by reading a few tokens; then it is ready.
    ///
    /// - Throws: `Phi3Error`.
    public func prewarm() async throws { try await engine.prewarm(adapter) }

    /// Gives memory back once the running text has ended; the next use loads the model again.
    public func unload() async { await engine.unload() }
}

/// What a model is, for people.
public struct ModelInfo: Sendable, Equatable {
    /// Where it lies.
    public enum Source: Sendable, Equatable {
        /// A folder `NAME.medphi`.
        case bundle(URL)
        /// A checkpoint's folder or file.
        case checkpoint(URL)
    }

    /// What people call it.
    public var name: String
    /// Where it lies.
    public var source: Source
    /// Which base its weights are.
    public var fingerprint: Fingerprint
    /// Bytes on disk.
    public var byteCount: Int
    /// The terms of use; `nil`: not stated.
    public var licence: String?
    /// How far the bundle was verified; `nil` for a checkpoint.
    public var verification: Manifest.Verification.Level?
    /// The adapters of the bundle, by name.
    public var adapters: [String]

    /// Makes a description.
    public init(
        name: String, source: Source, fingerprint: Fingerprint, byteCount: Int,
        licence: String? = nil, verification: Manifest.Verification.Level? = nil,
        adapters: [String] = []
    ) {
        self.name = name
        self.source = source
        self.fingerprint = fingerprint
        self.byteCount = byteCount
        self.licence = licence
        self.verification = verification
        self.adapters = adapters
    }
}
