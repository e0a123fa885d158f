import Foundation

/// `parity.json` and `parity.safetensors` of a bundle: what MLX says to a few prompts, with the very
/// weights that are in the package, and how far a backend may be from that.
struct GoldenLogits {
    /// How far a backend may be from MLX.
    struct Limits: Equatable {
        /// The largest difference of a logit, as a share of the largest logit of the row.
        var error: Double
        /// Mean KL(MLX ‖ backend), in nats.
        var kl: Double
        /// MLX's lead of its first token from which the backend must agree on it; also a share.
        var margin: Double
    }

    /// One prompt under one adapter.
    struct Case {
        let name: String
        /// "note" or "edge".
        let prompt: String
        /// `nil`: the base.
        let adapter: String?
        let ids: [Int32]
        /// The tokens MLX goes on with.
        let continuation: [Int32]
        /// Places in prompt and continuation whose logits were kept.
        let rows: [Int]
        let limits: Limits
        let logits: Tensor

        /// Everything that is read; the last token of the continuation is only predicted.
        var read: [Int32] { ids + continuation.dropLast() }

        /// MLX's logits of one of `rows`.
        func row(_ at: Int) -> [Double] {
            let width = logits.shape[1]
            return [Float](unsafeUninitializedCapacity: width) { room, count in
                logits.data.withUnsafeBytes { bytes in
                    let size = width * logits.type.size
                    Tensor.decode(
                        UnsafeRawBufferPointer(rebasing: bytes[at * size..<(at + 1) * size]),
                        logits.type, into: room)
                }
                count = width
            }.map(Double.init)
        }
    }

    let cases: [Case]

    private static let schema = 1

    /// Reads both files.
    ///
    /// - Throws: `Phi3Error`: missing, damaged, or not fitting each other or the manifest.
    static func read(_ bundle: ModelBundle) throws -> GoldenLogits {
        let url = bundle.parity
        guard FileBytes.kind(of: url) == .file else {
            throw Phi3Error.file(
                ErrorDetails(
                    place: bundle.url.path, found: "no \(url.lastPathComponent)",
                    expected: "a bundle with golden logits",
                    advice: "Export it with --verify graph."))
        }
        let document = try FileBytes.json(url)
        guard document["schema"]?.integer == schema else {
            throw Phi3Error.unsupportedSchema(
                ErrorDetails(
                    place: url.path, found: "schema \(document["schema"]?.shown ?? "nothing")",
                    expected: "schema \(schema)", advice: "Update the app."))
        }
        let name = document["logits"]?.string ?? ""
        guard ManifestChecks.pathProblem(name) == nil else {
            throw damaged(url, "its logits are at no place in the bundle")
        }
        let tensors = try SafetensorsFile(bundle.place(name))
        let entries = document["cases"]?.array ?? []
        guard !entries.isEmpty else { throw damaged(url, "no cases") }
        return GoldenLogits(
            cases: try entries.enumerated().map { at, entry in
                guard
                    let read = Reader(entry, document["limits"]).read(
                        tensors, bundle.manifest)
                else { throw damaged(url, "case \(at + 1) is damaged or not of this model") }
                return read
            })
    }

    private static func damaged(_ url: URL, _ what: String) -> Phi3Error {
        .damaged(path: url.path, what: what, advice: "Fetch or export the bundle again.")
    }

    /// Reads one case; `nil`: it does not fit.
    private struct Reader {
        let entry: JSONValue
        let limits: JSONValue?

        init(_ entry: JSONValue, _ limits: JSONValue?) {
            (self.entry, self.limits) = (entry, limits)
        }

        func read(_ tensors: SafetensorsFile, _ manifest: Manifest) -> Case? {
            let facts = manifest.medphi
            guard let name = entry["name"]?.string, let prompt = entry["prompt"]?.string,
                let limits = limits(prompt), let adapter = entry["adapter"],
                adapter.isNull || adapter.string != nil,
                let ids = wholes("ids", below: facts.model.vocabSize)?.map(Int32.init),
                let next = wholes("continuation", below: facts.model.vocabSize)?.map(Int32.init),
                let rows = wholes("rows", below: ids.count + max(0, next.count - 1)),
                ids.count + max(0, next.count - 1) <= facts.coreml.contextLength,
                !ids.isEmpty, !rows.isEmpty, zip(rows, rows.dropFirst()).allSatisfy({ $0 < $1 }),
                let tensor = tensors.tensor(name), tensor.type == .f32, tensor.isFinite,
                tensor.shape == [rows.count, facts.model.vocabSize]
            else { return nil }
            return Case(
                name: name, prompt: prompt, adapter: adapter.string, ids: ids, continuation: next,
                rows: rows, limits: limits, logits: tensor)
        }

        private func limits(_ prompt: String) -> Limits? {
            guard let own = limits?[prompt], let error = own["error"]?.double,
                let kl = own["kl"]?.double, let margin = own["margin"]?.double
            else { return nil }
            return Limits(error: error, kl: kl, margin: margin)
        }

        private func wholes(_ name: String, below end: Int) -> [Int]? {
            guard let items = entry[name]?.array else { return nil }
            let found = items.compactMap(\.integer).filter { (0..<max(0, end)).contains($0) }
            return found.count == items.count ? found : nil
        }
    }
}
