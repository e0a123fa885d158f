import Foundation

/// Reads a model's tokenizer and compares it with what manifest and configuration say of it.
enum TokenizerCheck {
    /// The tokenizer of a bundle.
    ///
    /// - Parameters:
    ///   - bundle: an opened bundle.
    ///   - verify: whether the bundle's test cases are computed.
    /// - Returns: the tokenizer, and how many test cases it was tried on.
    /// - Throws: `Phi3Error`: damaged, or not the one the manifest describes.
    static func load(
        _ bundle: ModelBundle, verify: Bool
    ) throws -> (tokenizer: Tokenizer, cases: Int) {
        let tokenizer = try Tokenizer.load(directory: bundle.tokenizerFolder)
        let lines = try problems(tokenizer, bundle)
        if !lines.isEmpty {
            throw Phi3Error.manifest(
                ProblemList(
                    path: bundle.place(Manifest.fileName).path,
                    what: "describes another tokenizer than the bundle has", problems: lines,
                    advice: "Fetch or export the bundle again."))
        }
        return (tokenizer, verify ? try tryCases(tokenizer, bundle) : 0)
    }

    /// The tokenizer beside a checkpoint.
    ///
    /// - Throws: `Phi3Error`: missing, damaged, or of another model.
    static func load(_ checkpoint: Checkpoint) throws -> Tokenizer {
        let file = checkpoint.folder.appendingPathComponent("tokenizer.json")
        if checkpoint.isSingleFile, FileBytes.kind(of: file) == .missing {
            throw Phi3Error.tokenizer(
                ErrorDetails(
                    place: checkpoint.url.path, found: "a single file, which holds no tokenizer",
                    expected: "tokenizer.json and tokenizer_config.json beside it",
                    advice: "Copy them, and generation_config.json, from its base."))
        }
        let tokenizer = try Tokenizer.load(directory: checkpoint.folder)
        func refused(_ found: String, _ expected: String) -> Phi3Error {
            .tokenizer(
                ErrorDetails(
                    place: checkpoint.folder.path, found: found, expected: expected,
                    advice: "Copy the tokenizer's files from the model's base."))
        }
        let rows = checkpoint.config.vocabSize
        if tokenizer.vocabularySize > rows {
            throw refused(
                "a tokenizer of \(tokenizer.vocabularySize) ids",
                "one of at most \(rows), the rows of the model's embedding")
        }
        if checkpoint.isSingleFile, let hash = checkpoint.metadata["tokenizer_sha256"],
            hash != (try SHA256.hex(contentsOf: file))
        {
            throw refused(
                "another tokenizer than \(checkpoint.url.lastPathComponent) was written with",
                "the one of SHA-256 \(hash.prefix(16))…")
        }
        return tokenizer
    }

    /// What manifest and tokenizer say differently; one line each.
    private static func problems(
        _ tokenizer: Tokenizer, _ bundle: ModelBundle
    ) throws -> [String] {
        let manifest = bundle.manifest
        let facts = manifest.medphi.tokenizer
        let generation = manifest.medphi.generation
        let template = tokenizer.chatTemplate
        let format = facts.chatFormat
        let ids: [(String, Int32)] = [
            ("bos", tokenizer.bosID), ("eos", tokenizer.eosID), ("pad", tokenizer.padID),
            ("end", tokenizer.endID), ("user", tokenizer.userID),
            ("assistant", tokenizer.assistantID), ("system", tokenizer.systemID),
        ]
        var lines = ids.compactMap { name, id in
            generation.specialTokenIDs[name] == Int(id)
                ? nil : "medphi.generation.special_token_ids.\(name) is not \(id)"
        }
        if generation.stopTokenIDs.isEmpty {
            lines.append("medphi.generation.stop_token_ids is empty, so no text would ever end")
        }
        for id in tokenizer.stopIDs where !generation.stopTokenIDs.contains(Int(id)) {
            lines.append("medphi.generation.stop_token_ids lacks \(id)")
        }
        for id in generation.stopTokenIDs
        where !(0..<tokenizer.vocabularySize).contains(id) {
            lines.append("medphi.generation.stop_token_ids has \(id), which is no token")
        }
        if tokenizer.vocabularySize > manifest.language.vocabSize {
            lines.append("language.vocab_size is less than \(tokenizer.vocabularySize)")
        }
        let same = [
            format.name == "phi3", format.opening == template.opening,
            format.closing == template.closing, format.afterRole == template.afterRole,
            format.afterEnd == template.afterEnd, format.knowsSystem == template.knowsSystem,
            format.skipsEmptySystem == template.skipsEmptySystem,
        ]
        if same.contains(false) {
            lines.append("medphi.tokenizer.chat_format is not what the chat template does")
        }
        for (path, sha256) in [
            (facts.path, facts.sha256), (facts.chatTemplate, facts.chatTemplateSHA256),
        ] where try SHA256.hex(contentsOf: bundle.place(path)) != sha256 {
            lines.append("\(path) has another SHA-256")
        }
        return lines
    }

    private static func tryCases(_ tokenizer: Tokenizer, _ bundle: ModelBundle) throws -> Int {
        let facts = bundle.manifest.medphi.tokenizer
        let place = bundle.vectors
        let cases = try TokenizerVectors(
            try MappedFile(place).data, place: place.path)
        guard cases.tokenizerSHA256 == facts.sha256,
            cases.chatTemplateSHA256 == facts.chatTemplateSHA256
        else {
            throw Phi3Error.tokenizerVectors(
                ErrorDetails(
                    place: place.path, found: "cases of another tokenizer",
                    expected: "those of the bundle's own",
                    advice: "Fetch or export the bundle again."))
        }
        return try cases.check(tokenizer)
    }
}
