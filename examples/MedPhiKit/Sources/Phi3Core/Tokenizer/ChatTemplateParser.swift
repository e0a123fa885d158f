extension ChatTemplate {
    /// The longest template that is read, in bytes; Phi-3's have about 500.
    static let longest = 16 << 10

    /// Reads the structure from a Jinja template of the Phi-3 family.
    ///
    /// - Parameters:
    ///   - template: the source, from chat_template.jinja or tokenizer_config.json.
    ///   - bosToken: what `bos_token` stands for.
    ///   - eosToken: what `eos_token` stands for.
    /// - Throws: `Phi3Error.chatTemplate` for another structure; the message says what is missing.
    public init(parsing template: String, bosToken: String, eosToken: String) throws(Phi3Error) {
        guard template.utf8.count <= ChatTemplate.longest else {
            throw unknown("\(template.utf8.count) bytes of template")
        }
        let flat = flattened(template)
        guard let (head, loop, tail) = loopParts(flat) else {
            throw unknown("no loop over the messages")
        }
        let anyRole = flat.firstMatch(of: eachMessage())?.output
        guard let message = flat.firstMatch(of: userMessage())?.output ?? anyRole else {
            throw unknown("no rule for <|user|> that ends in <|end|>")
        }
        guard has(flat, ChatRole.assistant.token) else { throw unknown("no <|assistant|>") }
        guard isOnlyRules(flat) else {
            throw unknown("text outside its rules")
        }
        guard head.isEmpty || head.wholeMatch(of: bosRule()) != nil else {
            throw unknown("something other than bos_token before the messages")
        }
        if has(loop, "bos_token") || has(loop, "eos_token") {
            throw unknown("a bos_token or eos_token inside the loop over the messages")
        }
        self.init(
            opening: head.isEmpty ? "" : bosToken,
            closing: has(tail, "eos_token") ? eosToken : "",
            afterRole: String(message.1), afterEnd: String(message.2),
            knowsSystem: anyRole != nil || has(flat, ChatRole.system.token),
            skipsEmptySystem: flat.firstMatch(of: systemWithContent()) != nil)
    }
}

private func unknown(_ what: String) -> Phi3Error {
    .chatTemplate(
        ErrorDetails(
            place: "the chat template", found: "not of Phi-3's form: \(what)",
            expected: "<|user|>, <|assistant|> and <|end|> around every message",
            advice: "Take tokenizer_config.json from a Phi-3 checkpoint."))
}

private func has(_ text: some StringProtocol, _ part: String) -> Bool {
    text.unicodeScalars.contains(part.unicodeScalars)
}

// Regular expressions see scalars, not characters: `\r\n` or a mark behind a quote is two things.
// They are made where they are used, because they are not Sendable.

private typealias MessageRegex = Regex<(Substring, Substring, Substring)>

/// Phi-3-small and Phi-3-vision write one rule for every role; the others one rule per role.
private func eachMessage() -> MessageRegex {
    #/
        <\|['"]\s*\+\s*message(?:\[['"]role['"]\]|\.role)\s*\+\s*['"]\|>(\n?)
        ['"]\s*\+\s*message(?:\[['"]content['"]\]|\.content)\s*\+\s*['"]<\|end\|>(\n?)
    /#
    .matchingSemantics(.unicodeScalar)
}

private func userMessage() -> MessageRegex {
    #/
        <\|user\|>(\n?)
        ['"]\s*\+\s*message(?:\[['"]content['"]\]|\.content)\s*\+\s*['"]<\|end\|>(\n?)
    /#
    .matchingSemantics(.unicodeScalar)
}

private func bosRule() -> Regex<Substring> {
    #/\{\{\s*bos_token\s*\}\}/#.matchingSemantics(.unicodeScalar)
}

private func systemWithContent() -> Regex<Substring> {
    #/==\s*'system'\s+and\s+message/#.matchingSemantics(.unicodeScalar)
}

/// Whether nothing stands between the rules: `{{ }}`, `{% %}` and `{# #}`.
///
/// No regular expression: one that looks for the end of each of ten thousand beginnings takes
/// seconds, and so does one for the white space before a rule.
private func isOnlyRules(_ flat: String) -> Bool {
    let text = Array(flat.unicodeScalars)
    let ends: [Unicode.Scalar: Unicode.Scalar] = ["{": "}", "%": "%", "#": "#"]
    var at = 0
    while at < text.count {
        guard text[at] == "{", at + 1 < text.count, let end = ends[text[at + 1]] else {
            return false
        }
        at += 2
        while !(at + 1 < text.count && text[at] == end && text[at + 1] == "}") {
            if at >= text.count { return false }
            at += 1
        }
        at += 2
    }
    return true
}

/// The text without the white space before `{{-`, `{%-` and `{#-`, and without their minus signs.
private func withoutSpaceBeforeRules(_ text: String) -> String {
    let scalars = Array(text.unicodeScalars)
    var out: [Unicode.Scalar] = []
    var at = 0
    while at < scalars.count {
        let isRule =
            at + 2 < scalars.count && scalars[at] == "{" && scalars[at + 2] == "-"
            && ["{", "%", "#"].contains(scalars[at + 1])
        if isRule {
            while let last = out.last, last.properties.isWhitespace { out.removeLast() }
            out += scalars[at...(at + 1)]
        } else {
            out.append(scalars[at])
        }
        at += isRule ? 3 : 1
    }
    return String(scalars: out)
}

/// What stands before, in and behind the first loop that has an end.
private func loopParts(_ flat: String) -> (head: Substring, loop: Substring, tail: Substring)? {
    guard
        let begin = flat.firstMatch(of: #/\{%\s*for\b/#.matchingSemantics(.unicodeScalar)),
        let end = flat[begin.range.upperBound...].matches(
            of: #/\{%\s*endfor\s*%\}/#.matchingSemantics(.unicodeScalar)
        ).last
    else { return nil }
    return (
        flat[..<begin.range.lowerBound], flat[begin.range.upperBound..<end.range.lowerBound],
        flat[end.range.upperBound...]
    )
}

/// The template without the white space that rendering drops, neighbouring literals joined.
private func flattened(_ template: String) -> String {
    func scalars<Output>(_ regex: Regex<Output>) -> Regex<Output> {
        regex.matchingSemantics(.unicodeScalar)
    }
    var text = template.replacing(scalars(#/\\n/#), with: "\n")
    text = text.replacing(scalars(#/['"]\s*\+\s*['"]/#), with: "")
    // As transformers renders: trim_blocks, lstrip_blocks, and the minus signs of Jinja.
    text = withoutSpaceBeforeRules(text)
    text = text.replacing(scalars(#/-([\}%\#]\})\s*/#)) { $0.output.1 }
    text = text.replacing(scalars(#/^[ \t]+(\{[%\#])/#.anchorsMatchLineEndings())) { $0.output.1 }
    text = text.replacing(scalars(#/([%\#]\})\n/#)) { $0.output.1 }
    return text.unicodeScalars.last == "\n" ? String(text.unicodeScalars.dropLast()) : text
}
