/// What a manifest says twice must agree, and its paths must stay inside the bundle.
enum ManifestChecks {
    /// What cannot be true, and paths that lead out of the bundle; one line each.
    static func contradictions(_ manifest: Manifest) -> [String] {
        shapeProblems(manifest) + nameProblems(manifest) + pathProblems(manifest)
    }

    /// Files that other keys name, and their hashes, against the list of all files.
    static func fileProblems(_ manifest: Manifest) -> [String] {
        let ours = manifest.medphi
        let tokenizer = ours.tokenizer
        var lines: [String] = []
        var hashes: [String: String] = [:]
        for entry in ours.files {
            hashes[entry.path] = entry.sha256
            if !isSHA256(entry.sha256) {
                lines.append("medphi.files: \(printable(entry.path)) has no SHA-256")
            }
        }
        let inside = Array("\(manifest.mainAsset)/".utf8)
        if !hashes.keys.contains(where: { $0.utf8.starts(with: inside) }) {
            lines.append("medphi.files: lists nothing of assets.main")
        }
        var named = [
            (tokenizer.path, tokenizer.sha256 as String?),
            (tokenizer.chatTemplate, tokenizer.chatTemplateSHA256),
            (tokenizer.vectors, hashes[tokenizer.vectors]),
        ]
        for entry in ours.adapters.list {
            if let path = entry.path { named.append((path, entry.sha256)) }
        }
        for (path, sha256) in named {
            guard let hash = hashes[path] else {
                lines.append("medphi.files: lacks \(printable(path)), which is named elsewhere")
                continue
            }
            if hash != sha256 {
                lines.append(
                    "medphi.files: another SHA-256 of \(printable(path)) is named elsewhere")
            }
        }
        return lines
    }

    /// Why a path must not be followed, or `nil`: it has to lie in the bundle, on every system.
    static func pathProblem(_ text: String) -> String? {
        let parts = text.utf8.split(separator: UInt8(ascii: "/"), omittingEmptySubsequences: false)
        let plain = parts.allSatisfy { part in
            !part.isEmpty && !part.elementsEqual(".".utf8) && !part.elementsEqual("..".utf8)
        }
        if !plain { return "leaves the bundle or is no plain path" }
        if text.unicodeScalars.contains(where: { $0 == "\\" || $0 == ":" || !isPrintable($0) }) {
            return "holds characters that are not for paths"
        }
        return nil
    }

    /// What is impossible about the package.
    private static func shapeProblems(_ manifest: Manifest) -> [String] {
        let coreml = manifest.medphi.coreml
        var lines: [String] = []
        for (name, signature) in coreml.functions {
            for tensor in signature.inputs + signature.outputs + signature.states
            where tensor.name.isEmpty || tensor.shape.isEmpty || tensor.shape.contains(0) {
                let place = "\(printable(name, limit: 40)).\(printable(tensor.name, limit: 40))"
                lines.append("medphi.coreml.functions.\(place) has an empty shape")
            }
        }
        if coreml.prefillWidth < 1 || coreml.prefillWidth > coreml.contextLength {
            lines.append("medphi.coreml.prefill_width is not between 1 and context_length")
        }
        return lines
    }

    /// Functions, stop ids, levels and slots that do not go together.
    private static func nameProblems(_ manifest: Manifest) -> [String] {
        let ours = manifest.medphi
        var lines: [String] = []
        var named = Set(manifest.language.functionMap.values.flatMap { $0 })
        named.insert(ours.coreml.defaultFunction)
        for entry in ours.adapters.list { named.formUnion(entry.functions.values) }
        for name in named where ours.coreml.functions[name] == nil {
            lines.append(
                "medphi.coreml.functions lacks \(printable(name, limit: 40)), which is named elsewhere"
            )
        }
        if ours.generation.stopTokenIDs.isEmpty {
            lines.append("medphi.generation.stop_token_ids is empty, so no text would ever end")
        }
        for level in Manifest.Verification.Level.allCases
        where level != .none && level <= ours.verification.level {
            if ours.verification.figures[level] == nil {
                let key = "medphi.verification.\(level.rawValue)"
                lines.append("\(key) has no figures, though the level is said reached")
            }
        }
        let described = ours.adapters.slotKind != nil && ours.adapters.rankSlot != nil
        if (ours.adapters.mode == .slots) != described {
            lines.append("medphi.adapters.slot_kind and rank_slot do not go with its mode")
        }
        return lines
    }

    private static func pathProblems(_ manifest: Manifest) -> [String] {
        let ours = manifest.medphi
        var named = [
            ("assets.main", manifest.mainAsset),
            ("language.tokenizer", manifest.language.tokenizer),
            ("medphi.tokenizer.path", ours.tokenizer.path),
            ("medphi.tokenizer.chat_template", ours.tokenizer.chatTemplate),
            ("medphi.tokenizer.vectors", ours.tokenizer.vectors),
        ]
        for entry in ours.adapters.list {
            guard let path = entry.path else { continue }
            named.append(("medphi.adapters.list.\(printable(entry.name, limit: 40))", path))
        }
        for (index, entry) in ours.files.enumerated() {
            named.append(("medphi.files[\(index)]", entry.path))
        }
        var lines = named.compactMap { name, path in
            pathProblem(path).map { "\(name): '\(printable(path))' \($0)" }
        }
        // Many disks do not tell upper case from lower.
        lines += twice("medphi.files", ours.files.map(\.path))
        lines += twice("medphi.adapters.list", ours.adapters.list.map(\.name))
        for entry in ours.adapters.list
        where entry.name.utf8.contains(UInt8(ascii: "/")) || pathProblem(entry.name) != nil {
            lines.append(
                "medphi.adapters.list: '\(printable(entry.name))' is no name for an adapter")
        }
        return lines
    }

    private static func twice(_ name: String, _ items: [String]) -> [String] {
        var seen: Set<String> = []
        return items.compactMap { item in
            let folded = item.uppercased().lowercased()
            return seen.insert(folded).inserted ? nil : "\(name) holds '\(printable(folded))' twice"
        }
    }
}
