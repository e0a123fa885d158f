/// Writing texts.
extension Phi3 {
    /// Starts writing.
    ///
    /// - Parameters:
    ///   - prompt: what to go on from.
    ///   - options: how.
    /// - Returns: the text while it is written; errors come when it is read.
    public func generate(_ prompt: Prompt, _ options: GenerationOptions = .init()) -> Generation {
        let (engine, adapter) = (engine, adapter)
        let ticket = engine.ticket()
        return Generation { emit in
            defer { ticket.giveUp() }
            let ids = try Phi3.ids(of: prompt, engine.tokenizer)
            return try await engine.generate(
                ids, adapter: adapter, options: options, ticket: ticket, emit: emit)
        }
    }

    /// Writes a text to its end.
    ///
    /// - Throws: `Phi3Error`.
    public func respond(
        to prompt: Prompt, _ options: GenerationOptions = .init()
    ) async throws -> Completion {
        try await generate(prompt, options).result
    }

    /// Starts writing the note of a conversation, in the words of the training.
    ///
    /// - Parameters:
    ///   - conversation: what was said.
    ///   - section: the part of the note to write, as `GENHX`; `nil`: the whole note.
    ///   - options: how.
    /// - Returns: the note while it is written; errors come when it is read.
    public func generateNote(
        from conversation: Conversation, section: String? = nil, options: NoteOptions = .init()
    ) -> NoteStream {
        let model = self
        let ticket = engine.ticket()
        return NoteStream { emit in
            defer { ticket.giveUp() }
            var writing = options.generation
            writing.maxTokens =
                writing.maxTokens
                ?? min(GenerationOptions.usualMaxTokens, model.contextLength / 2)
            let prompt = try model.encodeNotePrompt(
                conversation, section, writing, shortens: options.shortens)
            let start = NoteStart(
                promptTokens: prompt.ids.count, leftOutTurns: prompt.leftOutTurns,
                leftOutWords: prompt.leftOutWords)
            emit(.started(start))
            let part = NoteSection(name: section)
            var note = NoteText()
            let completion = try await model.engine.generate(
                prompt.ids, adapter: model.adapter, options: writing, ticket: ticket
            ) { delta in
                let piece = note.push(delta.text)
                if !piece.isEmpty { emit(.delta(piece, part)) }
            }
            return NoteStream.Result(
                note: ClinicalNote(text: note.text, section: part, adapter: model.activeAdapter),
                completion: completion, start: start)
        }
    }

    /// Tokens that a prompt takes.
    ///
    /// - Throws: `Phi3Error.input` for a role that the model's chats do not have.
    public func countTokens(_ prompt: Prompt) throws -> Int {
        try Phi3.ids(of: prompt, tokenizer).count
    }

    private static func ids(
        of prompt: Prompt, _ tokenizer: Tokenizer
    ) throws(Phi3Error) -> [Int32] {
        switch prompt {
        case .ids(let ids): ids
        case .messages(let messages): try tokenizer.encodeChat(messages)
        }
    }

    /// The prompt of a note, shortened to leave room for the note where that is allowed.
    private func encodeNotePrompt(
        _ conversation: Conversation, _ section: String?, _ options: GenerationOptions,
        shortens: Bool
    ) throws(Phi3Error) -> EncodedPrompt {
        try options.validate()
        let longest = options.maxTokens ?? 0
        if longest >= contextLength {
            throw .option(
                ErrorDetails(
                    place: "maxTokens", found: "\(longest)",
                    expected: "less than the context of \(contextLength) tokens, which holds "
                        + "conversation and note together",
                    advice: "Allow fewer tokens for the note."))
        }
        let prompt = try tokenizer.encodePrompt(
            conversation, section: section, maxLength: contextLength, reserve: longest)
        if !shortens, prompt.leftOutTurns > 0 || prompt.leftOutWords > 0 {
            throw .contextOverflow(
                ErrorDetails(
                    place: "the conversation",
                    found: "\(counted(prompt.leftOutTurns, "turn")) and "
                        + "\(counted(prompt.leftOutWords, "word")) of others do not fit",
                    expected:
                        "a context of \(contextLength) tokens, \(longest) of them for the note",
                    advice: "Allow shortening or fewer tokens for the note, or export the model "
                        + "with a longer context."))
        }
        return prompt
    }
}
