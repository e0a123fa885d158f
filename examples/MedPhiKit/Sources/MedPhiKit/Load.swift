import Foundation
import Phi3CoreML
import Phi3Reference

extension Phi3 {
    /// Loads a model from this machine; the network is never asked.
    ///
    /// Of a bundle every file is hashed and its tokenizer is tried on the bundle's own test cases; a
    /// model that does not fit into memory is refused before it is loaded.
    ///
    /// ```swift
    /// let base = try await Phi3.load(bundleURL)
    /// let model = try await base.applyLoRA("medical_changes.safetensors")
    /// ```
    ///
    /// - Parameters:
    ///   - url: a bundle `NAME.medphi`, a checkpoint's folder, or a single-file model
    ///     `NAME.safetensors` with its tokenizer's files beside it.
    ///   - backend: what computes.
    ///   - options: what is checked, and with which limits it is loaded.
    ///   - progress: is told what goes on.
    /// - Returns: a handle on the model, which is in memory.
    /// - Throws: `Phi3Error`, or `CancellationError`.
    public static func load(
        _ url: URL, backend: BackendChoice = .automatic, options: LoadOptions = .init(),
        progress: (@Sendable (LoadEvent) -> Void)? = nil
    ) async throws -> Phi3 {
        let report = progress ?? { _ in }
        try OpenedModel.checkPlace(url, backend, options)
        let opened = try await Blocking.run { isCancelled in
            try OpenedModel(url, verify: options.verify) { done, total in
                if isCancelled() { throw CancellationError() }
                report(.verifying(done: done, total: total))
            }
        }
        let chosen = try opened.backend(backend, options)
        let model = try Phi3(
            backend: chosen, tokenizer: opened.tokenizer, info: opened.info(chosen.facts),
            bundle: opened.bundle)
        try await model.load(progress: report)
        return model
    }
}

/// A model whose files were read and checked, but for its weights.
struct OpenedModel: Sendable {
    /// What the files are.
    enum Files: Sendable {
        case bundle(ModelBundle)
        case checkpoint(Checkpoint)
    }

    let files: Files
    let tokenizer: Tokenizer

    /// The bundle, where it is one.
    var bundle: ModelBundle? {
        if case .bundle(let bundle) = files { return bundle }
        return nil
    }

    /// Opens whatever is at a place.
    ///
    /// - Parameters:
    ///   - url: a bundle, a checkpoint's folder, or a single file.
    ///   - verify: whether a bundle's files are hashed and its test cases computed.
    ///   - progress: called with the bytes hashed so far and in all; may throw to stop.
    init(
        _ url: URL, verify: Bool, progress: @escaping (_ done: Int, _ total: Int) throws -> Void
    ) throws {
        let manifest = url.appendingPathComponent(Manifest.fileName)
        if url.pathExtension == "medphi" || FileBytes.kind(of: manifest) == .file {
            let bundle = try ModelBundle.open(url, check: verify, progress: progress)
            files = .bundle(bundle)
            tokenizer = try TokenizerCheck.load(bundle, verify: verify).tokenizer
        } else {
            let checkpoint = try Checkpoint.open(url)
            files = .checkpoint(checkpoint)
            tokenizer = try TokenizerCheck.load(checkpoint)
        }
    }

    /// Refuses what can be refused before anything is read.
    static func checkPlace(
        _ url: URL, _ backend: BackendChoice, _ options: LoadOptions
    ) throws(Phi3Error) {
        if !url.isFileURL {
            throw .option(
                ErrorDetails(
                    place: "the place of the model", found: "an address on a network",
                    expected: "a file or folder on this device",
                    advice: "Fetch the bundle with BundleStore first."))
        }
        if backend == .coreML, !hasCoreML, !options.allowsSubstitute {
            throw .modelLoad(
                ErrorDetails(
                    place: url.path, found: "a system without Core ML",
                    expected: "an Apple device, which that backend needs",
                    advice: "Choose the reference backend here."))
        }
    }

    /// What the model is, for people.
    func info(_ facts: BackendFacts) -> ModelInfo {
        switch files {
        case .bundle(let bundle):
            let manifest = bundle.manifest
            return ModelInfo(
                name: manifest.name, source: .bundle(bundle.url),
                fingerprint: facts.target.fingerprint, byteCount: bundle.byteCount,
                licence: manifest.source.licence,
                verification: manifest.medphi.verification.level,
                adapters: manifest.medphi.adapters.list.map(\.name))
        case .checkpoint(let checkpoint):
            return ModelInfo(
                name: checkpoint.url.deletingPathExtension().lastPathComponent,
                source: .checkpoint(checkpoint.url), fingerprint: facts.target.fingerprint,
                byteCount: checkpoint.byteCount)
        }
    }

    /// The backend that computes with it; no weight is read yet.
    func backend(_ choice: BackendChoice, _ options: LoadOptions) throws -> any TokenBackend {
        switch (choice, files) {
        case (.coreML, .checkpoint(let checkpoint)):
            throw OpenedModel.noCoreML(checkpoint.url, "a checkpoint", "a bundle NAME.medphi")
        case (.coreML, .bundle(let bundle)):
            return try coreML(bundle, options)
        case (.automatic, .bundle(let bundle)) where OpenedModel.hasCoreML:
            return try coreML(bundle, options)
        default: return try reference(options)
        }
    }

    private static var hasCoreML: Bool {
        #if canImport(Darwin)
            return true
        #else
            return false
        #endif
    }

    private static func noCoreML(_ url: URL, _ found: String, _ expected: String) -> Phi3Error {
        .modelLoad(
            ErrorDetails(
                place: url.path, found: "\(found), which Core ML cannot run", expected: expected,
                advice: "Export a bundle (mlx_medphi export) for an Apple device, or choose the "
                    + "reference backend."))
    }

    private func coreML(_ bundle: ModelBundle, _ options: LoadOptions) throws -> any TokenBackend {
        let own = bundle.manifest.medphi.coreml.contextLength
        if let asked = options.context, asked != own {
            throw Phi3Error.option(
                ErrorDetails(
                    place: "context", found: "\(asked)",
                    expected: "\(own), which is fixed in the package",
                    advice: "Leave it out, or export the model with this context."))
        }
        let backend = CoreMLBackend(
            bundle: bundle,
            options: CoreMLOptions(units: options.units, cacheFolder: options.cache))
        if options.memoryCheck {
            try MemoryCheck.plan(backend.facts, place: bundle.url, context: own).requireFit()
        }
        return backend
    }

    private func reference(_ options: LoadOptions) throws -> any TokenBackend {
        let backend: ReferenceBackend
        let place: URL
        switch files {
        case .bundle(let bundle):
            backend = try ReferenceBackend(bundle, context: options.context)
            try PackageContract.check(bundle)
            place = bundle.url
        case .checkpoint(let checkpoint):
            backend = try ReferenceBackend(checkpoint, context: options.context)
            place = checkpoint.url
        }
        if options.memoryCheck {
            // A shorter context would shorten other conversations, so it is never chosen unasked.
            try MemoryCheck.plan(
                backend.facts, place: place, context: backend.facts.contextLength
            ).requireFit()
        }
        return backend
    }
}
