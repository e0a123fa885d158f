/// A prompt as tokens; it ends where the model goes on to write the note.
public struct EncodedPrompt: Sendable, Equatable {
    /// The ids, ending in `<|assistant|>`.
    public var ids: [Int32]
    /// Turns of the conversation that did not fit.
    public var leftOutTurns: Int
    /// Words left out of turns that by themselves were too long.
    public var leftOutWords: Int
}

extension Tokenizer {
    /// The prompt that asks for a note, shortened so that `reserve` tokens stay free for it. The
    /// ids are those of the Python package for the same conversation and the same limits.
    ///
    /// - Parameters:
    ///   - conversation: what was said.
    ///   - section: the part of the note to write, as `GENHX`; nil for the whole note.
    ///   - maxLength: tokens of prompt and note together.
    ///   - reserve: tokens kept free for the note.
    /// - Throws: `Phi3Error.input` for an empty conversation or a bad section name,
    ///   `.contextOverflow` where there is no room for any of it, `.option` for negative numbers.
    public func encodePrompt(
        _ conversation: Conversation, section: String? = nil, maxLength: Int, reserve: Int
    ) throws(Phi3Error) -> EncodedPrompt {
        guard maxLength >= 0, reserve >= 0 else {
            throw Phi3Error.option(
                ErrorDetails(
                    place: "the room for a prompt", found: "\(maxLength) less \(reserve) tokens",
                    expected: "no negative numbers", advice: "Give the model's context."))
        }
        let turns = Tokenizer.lines(of: conversation)
        guard turns.contains(where: { !PythonText.isBlank($0) }) else {
            throw Phi3Error.input(
                ErrorDetails(
                    place: "the conversation", found: "no words", expected: "at least one turn",
                    advice: "Give the text of a conversation."))
        }
        let (before, after) = try NotePrompt.parts(section: section)
        func ids(_ text: String) throws(Phi3Error) -> [Int32] {
            try encodeChat([ChatMessage(role: .user, content: before + text + after)])
        }
        let whole = turns.joined(separator: "\n")
        let all = try ids(whole)
        // Not below 0, so that numbers which cannot be meant are no overflow further on.
        let limit = max(0, maxLength - reserve)
        if all.count <= limit { return EncodedPrompt(ids: all, leftOutTurns: 0, leftOutWords: 0) }
        // Text between two added tokens is encoded by itself, so one message can be counted alone.
        func count(_ text: String) -> Int { countUserMessage(before + text + after) }
        let beside = all.count - count(whole)
        let shortener = Shortener(turns: turns, noun: "turn", room: limit - beside, count: count)
        guard let short = shortener.shortened() else {
            throw Phi3Error.contextOverflow(
                ErrorDetails(
                    place: "the prompt",
                    found: "\(all.count) tokens, \(beside + count("")) of them without the "
                        + "conversation",
                    expected: "at most \(limit): a context of \(maxLength) less \(reserve) for the "
                        + "note",
                    advice: "Allow fewer tokens for the note, or give a shorter conversation."))
        }
        return EncodedPrompt(
            ids: try ids(short.text), leftOutTurns: short.leftOutTurns,
            leftOutWords: short.leftOutWords)
    }

    /// The lines that may be left out. Text without speakers is one turn; its lines are as near to
    /// turns as can be told.
    private static func lines(of conversation: Conversation) -> [String] {
        conversation.turns.flatMap { turn in
            turn.speaker.isEmpty
                ? PythonText.lines(turn.text.unicodeScalars).map { String(scalars: $0) }
                : [turn.line]
        }
    }
}
