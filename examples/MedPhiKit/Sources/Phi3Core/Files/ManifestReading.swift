import Foundation

extension Manifest {
    /// A manifest is some tens of kilobytes.
    static let mostBytes = 16 << 20

    /// Reads and checks `metadata.json` of a bundle.
    ///
    /// - Parameter bundle: the bundle's folder.
    /// - Throws: `Phi3Error`: missing, damaged, made by a newer version, or in contradiction with
    ///   itself; everything that is wrong is in one error.
    public static func read(in bundle: URL) throws -> Manifest {
        let url = bundle.appendingPathComponent(fileName)
        return try parse(try FileBytes.json(url, limit: mostBytes), place: url.path)
    }

    /// The manifest that parsed JSON holds.
    ///
    /// - Parameters:
    ///   - value: the parsed file.
    ///   - place: its name, for messages.
    public static func parse(_ value: JSONValue, place: String = fileName) throws -> Manifest {
        try checkSchema(value, place)
        let problems = ManifestReader.Problems()
        let manifest = read(ManifestReader(value: value, path: "", problems: problems))
        var lines = problems.lines
        if lines.isEmpty, let manifest {
            lines = ManifestChecks.contradictions(manifest) + ManifestChecks.fileProblems(manifest)
            if lines.isEmpty { return manifest }
        }
        throw Phi3Error.manifest(
            ProblemList(
                path: place, what: "not a manifest of this form", problems: lines,
                advice: "Export the bundle again."))
    }

    private static func checkSchema(_ value: JSONValue, _ place: String) throws {
        func refused(_ line: String) -> Phi3Error {
            .manifest(
                ProblemList(
                    path: place, what: "not the manifest of a bundle that mlx_medphi exported",
                    problems: [line], advice: "Give the folder of a bundle, or export it again."))
        }
        guard let ours = value["medphi"]?.object else {
            throw refused("it has no section 'medphi'")
        }
        guard let found = ours["schema"]?.integer, found >= 1 else {
            throw refused(
                "medphi.schema is \(ours["schema"]?.shown ?? "missing"), expected a number from 1 up"
            )
        }
        if found > schema {
            throw Phi3Error.unsupportedSchema(
                ErrorDetails(
                    place: place, found: "made by a newer mlx_medphi (schema \(found))",
                    expected: "schema \(schema) at most", advice: "Update this package."))
        }
    }

    private static func read(_ root: ManifestReader) -> Manifest? {
        let version = root.constant("metadata_version", "0.2")
        let kind = root.constant("kind", "llm")
        let name = root.text("name")
        let compression = root.text("compression")
        let main = root.section("assets") { $0.text("main") }
        let language = root.section("language") { here in
            Language(
                tokenizer: here.text("tokenizer"), vocabSize: here.whole("vocab_size"),
                maxContextLength: here.whole("max_context_length"),
                embeddedTokenizer: here.flag("embedded_tokenizer"),
                functionMap: here.member("function_map", or: [:]) {
                    $0.map { $0.list { $0.text() } }
                })
        }
        let source = root.section("source") { here in
            Source(
                modelID: here.text("model_id"), revision: here.optionalText("revision"),
                licence: here.text("licence"))
        }
        let compilation = root.section("compilation") { here in
            Compilation(targets: here.texts("targets"), date: here.text("date"))
        }
        let ours = root.section("medphi") { medphi($0) }
        guard let main, let language, let source, let compilation, let ours else { return nil }
        return Manifest(
            metadataVersion: version, kind: kind, name: name, mainAsset: main, language: language,
            source: source, compression: compression, compilation: compilation, medphi: ours)
    }

    private static func medphi(_ here: ManifestReader) -> MedPhi? {
        let schema = here.whole("schema")
        let coreml = here.section("coreml") { ManifestSections.coreml($0) }
        let model = here.section("model") { ManifestSections.model($0) }
        let quantization = here.section("quantization") { ManifestSections.quantization($0) }
        let tokenizer = here.section("tokenizer") { ManifestSections.tokenizer($0) }
        let generation = here.section("generation") { ManifestSections.generation($0) }
        let adapters = here.section("adapters") { ManifestSections.adapters($0) }
        let fingerprint = Fingerprint(here.text("base_fingerprint"))
        let memory = here.section("memory") { here in
            MemoryFacts(
                weights: here.whole("weights"), kvPerToken: here.whole("kv_per_token"),
                kv: here.whole("kv"), adapterSlots: here.whole("adapter_slots"),
                resident: here.whole("resident"))
        }
        let cost = here.anyObject("cost")
        let export = here.anyObject("export")
        let verification = here.section("verification") { ManifestSections.verification($0) }
        let exporter = here.member("exporter", or: [:]) {
            $0.map { here -> String?? in .some(here.optional { $0.text() }) }
        }
        let files = here.list("files") { ManifestSections.file($0) }
        guard let coreml, let model, let quantization, let tokenizer,
            let generation, let adapters, let memory, let verification
        else { return nil }
        return MedPhi(
            schema: schema, coreml: coreml, model: model, quantization: quantization,
            tokenizer: tokenizer, generation: generation, adapters: adapters,
            baseFingerprint: fingerprint, memory: memory, cost: cost, verification: verification,
            export: export, exporter: exporter, files: files)
    }
}
