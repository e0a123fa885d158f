import Foundation

/// Where an adapter is.
public enum AdapterSource: Sendable, Equatable, ExpressibleByStringLiteral {
    /// An adapter of the bundle by its name; where the bundle has none of this name, a path.
    case named(String)
    /// The single file that training writes, a slot pack, or a folder of mlx-lm or PEFT.
    case file(URL)

    /// A name in the bundle, or a path.
    public init(stringLiteral value: String) { self = .named(value) }
}

extension Phi3 {
    /// The same with a name in the bundle, or a path.
    @_disfavoredOverload
    public func applyLoRA(
        _ name: String, options: AdapterOptions = AdapterOptions()
    ) async throws -> Phi3 {
        try await applyLoRA(.named(name), options: options)
    }

    /// The same with a file or a folder.
    public func applyLoRA(
        _ url: URL, options: AdapterOptions = AdapterOptions()
    ) async throws -> Phi3 {
        try await applyLoRA(.file(url), options: options)
    }
}

extension BoundAdapter {
    /// An adapter from a file that was checked against the model.
    ///
    /// - Parameters:
    ///   - adapter: the adapter.
    ///   - name: what people call it.
    public init(_ adapter: Adapter, name: String) {
        self.init(id: AdapterID(name: name, sha256: adapter.effectSHA256), adapter: adapter)
    }
}

/// Adapters, and writing models.
extension Phi3 {
    /// The model with an adapter on it instead of any other.
    ///
    /// - Parameters:
    ///   - source: a name in the bundle, a file or a folder.
    ///   - options: what is accepted that would otherwise be refused.
    /// - Returns: a new handle on the same weights.
    /// - Throws: `Phi3Error` with everything that speaks against it.
    public func applyLoRA(
        _ source: AdapterSource, options: AdapterOptions = AdapterOptions()
    ) async throws -> Phi3 {
        Phi3(self, adapter: try bound(source, options))
    }

    /// The base: a handle on the same weights without an adapter.
    public func removingLoRA() -> Phi3 { Phi3(self, adapter: nil) }

    /// Writes the model with its adapter.
    ///
    /// A checkpoint becomes one with the adapter folded in: one file where the name ends in
    /// `.safetensors`, a folder otherwise. A bundle becomes a bundle that has the adapter among its
    /// own; its weights are copied as they are.
    ///
    /// - Parameters:
    ///   - url: where; it appears complete or not at all.
    ///   - replace: whether what is there is replaced.
    /// - Throws: `Phi3Error`.
    public func save(_ url: URL, replace: Bool = false) async throws {
        try await engine.save(url, adapter: adapter, replace: replace)
    }

    /// Writes the adapter by itself.
    ///
    /// - Parameters:
    ///   - url: a name ending in `.safetensors` makes one file, any other a folder.
    ///   - replace: whether what is there is replaced.
    /// - Throws: `Phi3Error`: no adapter, or one that is built into the package.
    public func saveLoRA(_ url: URL, replace: Bool = false) async throws {
        guard let changes = adapter?.adapter else {
            throw Phi3Error.input(
                ErrorDetails(
                    place: url.path,
                    found: adapter.map { "adapter \($0.id.name), which is built into the package" }
                        ?? "a model without adapter",
                    expected: "an adapter to save", advice: "Apply an adapter from a file first."))
        }
        let facts = engine.backend.facts
        let base = Adapter.Origin(
            baseName: info.name, baseFingerprint: facts.target.fingerprint,
            baseQuantization: facts.checkpoint?.config.quantization?.section.object)
        try changes.described(layerCount: facts.target.layerCount, base: base)
            .write(to: url, replace: replace)
    }

    private func bound(
        _ source: AdapterSource, _ options: AdapterOptions
    ) throws -> BoundAdapter {
        let list = bundle?.manifest.medphi.adapters.list ?? []
        if case .named(let name) = source, let entry = list.first(where: { $0.name == name }) {
            return try bound(entry, options)
        }
        let url =
            switch source {
            case .file(let url): url
            case .named(let name): URL(fileURLWithPath: name)
            }
        if case .named(let name) = source, FileBytes.kind(of: url) == .missing {
            let known = list.isEmpty ? "none" : capped(list.map(\.name))
            throw Phi3Error.input(
                ErrorDetails(
                    place: "adapter \(name)",
                    found: "no adapter of this name (the bundle has: \(known)) and no file",
                    expected: "a name in the bundle, or the path of an adapter",
                    advice: "Check the name, or give the file's whole path."))
        }
        try checkSupport(url.lastPathComponent)
        return try read(url, named: url.deletingPathExtension().lastPathComponent, options)
    }

    private func bound(
        _ entry: Manifest.Adapters.Entry, _ options: AdapterOptions
    ) throws -> BoundAdapter {
        if !entry.functions.isEmpty {
            let id = AdapterID(name: entry.name, sha256: entry.sha256 ?? "")
            return BoundAdapter(id: id, adapter: nil, functions: entry.functions)
        }
        try checkSupport(entry.name)
        guard let bundle, let path = entry.path else {
            throw refused(entry.name, "exists in the package only, and no function has it")
        }
        return try read(bundle.place(path), named: entry.name, options)
    }

    private func read(
        _ url: URL, named name: String, _ options: AdapterOptions
    ) throws -> BoundAdapter {
        let facts = engine.backend.facts
        let adapter = try Adapter.load(
            url, for: facts.target, base: facts.checkpoint, options: options)
        return BoundAdapter(adapter, name: name)
    }

    private func checkSupport(_ name: String) throws(Phi3Error) {
        switch engine.backend.facts.adapterSupport {
        case .any: return
        case .builtIn(let names):
            throw refused(
                name, "this package has its adapters built in: \(capped(names))")
        case .none(let reason): throw refused(name, reason)
        }
    }

    private func refused(_ name: String, _ problem: String) -> Phi3Error {
        .adapterIncompatible(
            ProblemList(
                path: name, what: "cannot be put on this model", problems: [problem],
                advice: "Export the bundle with adapter slots (mlx_medphi export --adapters slots)."
            ))
    }
}
