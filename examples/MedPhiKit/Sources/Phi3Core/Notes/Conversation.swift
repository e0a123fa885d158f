import Foundation

/// What one speaker said before the next one spoke.
public struct Turn: Sendable, Equatable, Codable, CustomStringConvertible {
    /// A canonical name such as `Doctor` or `Guest_family_2`; empty for plain text.
    public let speaker: String
    /// The words, on one line unless the speaker is empty.
    public let text: String
    /// Seconds from the start of the recording, where the source says so.
    public let start: Double?
    /// Seconds, likewise.
    public let end: Double?

    /// - Throws: `Phi3Error.input`: the speaker is not canonical, or the text of a named speaker
    ///   has a line break.
    public init(
        speaker: String, text: String, start: Double? = nil, end: Double? = nil
    ) throws(Phi3Error) {
        if !speaker.isEmpty {
            guard Speakers.isCanonical(speaker) else { throw Turn.notCanonical }
            guard !text.unicodeScalars.contains(where: { $0 == "\n" || $0 == "\r" }) else {
                throw Turn.lineBreak(speaker)
            }
        }
        self.speaker = speaker
        self.text = text
        self.start = start
        self.end = end
    }

    /// Reads a turn, which must be one that `init(speaker:text:start:end:)` takes.
    public init(from decoder: any Decoder) throws {
        let values = try decoder.container(keyedBy: CodingKeys.self)
        try self.init(
            speaker: values.decodeIfPresent(String.self, forKey: .speaker) ?? "",
            text: values.decode(String.self, forKey: .text),
            start: values.decodeIfPresent(Double.self, forKey: .start),
            end: values.decodeIfPresent(Double.self, forKey: .end))
    }

    /// Who spoke and how much, without the words.
    public var description: String {
        "Turn(\(speaker.isEmpty ? "text" : speaker), \(PythonText.words(text).count) words)"
    }

    /// The line of a conversation's text.
    var line: String { speaker.isEmpty ? text : "\(speaker): \(text)" }

    private static let notCanonical = Phi3Error.input(
        ErrorDetails(
            place: "a turn", found: "its speaker is not a canonical name",
            expected:
                "one of \(Speakers.canonical.joined(separator: ", ")), with or without a number "
                + "as in Doctor_2, or nothing for plain text",
            advice: "Use one of these names."))

    private static func lineBreak(_ speaker: String) -> Phi3Error {
        .input(
            ErrorDetails(
                place: "a turn of \(speaker)", found: "a line break", expected: "one line per turn",
                advice: "Join its lines with spaces, or read the whole text with "
                    + "Conversation(text:)."))
    }
}

/// The turns of one conversation, in order.
///
/// ```swift
/// let conversation = try Conversation(text: "Dr: How are you?\nPatient: Fine,\nthanks.")
/// conversation.text  // "Doctor: How are you?\nPatient: Fine, thanks."
/// ```
public struct Conversation: Sendable, Equatable, Codable, CustomStringConvertible {
    /// What was said, in order.
    public var turns: [Turn]

    /// Makes a conversation of turns.
    public init(turns: [Turn]) {
        self.turns = turns
    }

    /// Reads a conversation with one tagged turn per line.
    ///
    /// A line without a known speaker goes on with the turn before it; lines before the first tag
    /// become one turn without a speaker; tags with nothing behind them are dropped.
    ///
    /// - Throws: `Phi3Error.input` for a tag whose number no speaker can have, as `Doctor 0`.
    public init(text: String) throws(Phi3Error) {
        var head: [[Unicode.Scalar]] = []
        var spoken: [(speaker: String, parts: [[Unicode.Scalar]])] = []
        for line in PythonText.lines(cleanText(text)) {
            if let (speaker, rest) = Speakers.splitTag(line) {
                spoken.append((speaker, [rest]))
            } else if spoken.isEmpty {
                head.append(line)
            } else {
                spoken[spoken.count - 1].parts.append(PythonText.stripped(line))
            }
        }
        let plain = PythonText.stripped(Array(head.joined(separator: ["\n"])))
        var turns = [try Turn(speaker: "", text: String(scalars: plain))]
        for (speaker, parts) in spoken {
            let words = parts.filter { !$0.isEmpty }.joined(separator: [" "])
            turns.append(try Turn(speaker: speaker, text: String(scalars: words)))
        }
        self.turns = turns.filter { !$0.text.isEmpty }
    }

    /// Reads a conversation from the bytes of a text file.
    ///
    /// - Throws: `Phi3Error.input` for bytes that are not UTF-8; see also `init(text:)`.
    public init(utf8 data: Data) throws(Phi3Error) {
        guard let text = String(validating: data, as: UTF8.self) else {
            throw Phi3Error.input(
                ErrorDetails(
                    place: "a conversation", found: "bytes that are not UTF-8",
                    expected: "a text file in UTF-8", advice: "Save the file again as UTF-8."))
        }
        try self.init(text: text)
    }

    /// One line per turn, `Speaker: words`; plain text stands as it is.
    public var text: String { turns.map(\.line).joined(separator: "\n") }

    /// What was said, without the speaker tags, one line per turn.
    public var words: String { turns.map(\.text).joined(separator: "\n") }

    /// How much was said, without the words.
    public var description: String {
        "Conversation(\(turns.count) turns, \(PythonText.words(words).count) words)"
    }
}

/// Line breaks as LF, invisible characters as plain spaces or nothing, no space at line ends.
private func cleanText(_ text: String) -> [Unicode.Scalar] {
    var clean: [Unicode.Scalar] = []
    var wasReturn = false
    for scalar in text.unicodeScalars {
        switch scalar.value {
        case 0x0A where wasReturn: break
        case 0x0D: clean.append("\n")
        case 0x09, 0xA0, 0x2007, 0x2009, 0x202F: clean.append(" ")
        case 0x200B, 0x2060, 0xFEFF: break
        default: clean.append(scalar)
        }
        wasReturn = scalar == "\r"
    }
    let lines = PythonText.lines(clean).map { PythonText.rightStripped($0) }
    return PythonText.stripped(Array(lines.joined(separator: ["\n"])))
}
