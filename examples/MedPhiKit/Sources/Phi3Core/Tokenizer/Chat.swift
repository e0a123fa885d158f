extension Tokenizer {
    /// Ids of a chat, those of the checkpoint's own chat template, except that words which look
    /// like one of its tokens stay words.
    ///
    /// - Parameters:
    ///   - messages: user and assistant in turn, after an optional system message.
    ///   - generation: end in `<|assistant|>`, for the model to go on, not in the closing token.
    /// - Throws: `Phi3Error.input` for a role the template cannot write.
    public func encodeChat(
        _ messages: [ChatMessage], generation: Bool = true
    ) throws(Phi3Error) -> [Int32] {
        encode(try chatTemplate.pieces(messages, generation: generation))
    }

    /// How many ids the one message of a user takes, everything around it included.
    func countUserMessage(_ content: String) -> Int {
        let message = ChatMessage(role: .user, content: content)
        return (try? encodeChat([message], generation: false).count) ?? 0
    }

    /// Text between two tokens is encoded in one go and loses the white space that the token before
    /// it swallows, as in the file's own pipeline.
    private func encode(_ pieces: [ChatTemplate.Piece]) -> [Int32] {
        var ids: [Int32] = []
        var before: AddedToken?
        var text = ""
        for piece in pieces {
            guard piece.isToken else {
                text.unicodeScalars.append(contentsOf: piece.text.unicodeScalars)
                continue
            }
            encode(text, behind: before, into: &ids)
            text = ""
            before = addedToken(piece.text)
            if let before { ids.append(before.id) }
        }
        encode(text, behind: before, into: &ids)
        return ids
    }

    /// Compares a small chat with the file's own pipeline before any work is done with it.
    func prove(_ place: String) throws {
        let probe = [
            ChatMessage(
                role: .user,
                content: "Doctor: any  fever?\n\nPatient: 38.5 °C, since Monday \n"),
            ChatMessage(role: .assistant, content: " Fever of 38.5 °C."),
        ]
        let pieces = try chatTemplate.pieces(probe, generation: false)
        guard encode(pieces) == encodeUnsafeRaw(pieces.map(\.text).joined()) else {
            throw Phi3Error.tokenizer(
                ErrorDetails(
                    place: place, found: "text beside the added tokens is split in another way",
                    expected: "Phi-3's way",
                    advice: "Take the tokenizer files from a Phi-3 checkpoint."))
        }
    }
}
