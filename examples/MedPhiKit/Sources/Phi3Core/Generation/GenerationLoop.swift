/// Token after token: logits, choice, text, until something ends it.
struct GenerationLoop {
    let backend: any TokenBackend
    let tokenizer: Tokenizer
    let stopIDs: Set<Int32>
    let suppressed: [ClosedRange<Int32>]

    /// What is written so far.
    private struct Page {
        var ids: [Int32] = []
        var text = ""
        var decoder: StreamingDecoder
        var filter: StopFilter

        /// Text that an id decides.
        mutating func take(_ id: Int32) -> String {
            ids.append(id)
            return put(filter.push(decoder.step(id)).text)
        }

        /// Text that is decided by there being no more. What never got its last byte is no character.
        mutating func finish() -> String {
            var rest = decoder.flush().unicodeScalars
            while rest.last == "\u{FFFD}" { rest.removeLast() }
            let decided = filter.push(String(rest)).text
            return put(decided + filter.flush().text)
        }

        private mutating func put(_ piece: String) -> String {
            text += piece
            return piece
        }
    }

    /// Writes a text.
    ///
    /// - Parameters:
    ///   - prompt: its ids; see `checkPrompt`.
    ///   - adapter: what is on the model.
    ///   - options: how it is written.
    ///   - isolation: the engine.
    ///   - emit: is given each piece.
    /// - Throws: `Phi3Error`. A cancelled task is no error: the text so far is returned.
    func run(
        _ prompt: [Int32], adapter: BoundAdapter?, options: GenerationOptions,
        isolation: isolated (any Actor)? = #isolation, emit: (Delta) -> Void
    ) async throws -> Completion {
        let sampler = try Sampler(options.sampling, suppressing: suppressed)
        var page = Page(
            decoder: tokenizer.streamingDecoder(), filter: try StopFilter(options.stopStrings))
        let clock = ContinuousClock()
        let start = clock.now
        var (prefill, first) = (Duration.zero, Duration.zero)
        var reason = StopReason.cancelled
        do {
            while true {
                try Task.checkCancellation()
                let logits = try await backend.logits(after: prompt + page.ids, adapter: adapter)
                if page.ids.isEmpty { prefill = clock.now - start }
                try check(logits)
                let id = try sampler.next(logits: logits, written: page.ids)
                if page.ids.isEmpty { first = clock.now - start }
                if stopIDs.contains(id) {
                    reason = .endOfTurn
                    break
                }
                emit(Delta(text: page.take(id), ids: [id]))
                if let ended = end(page.ids.count, prompt.count, page.filter.stop, options) {
                    reason = ended
                    break
                }
            }
        } catch is CancellationError {
            reason = .cancelled
        }
        let rest = page.finish()
        if !rest.isEmpty { emit(Delta(text: rest, ids: [])) }
        if let stop = page.filter.stop { reason = .stopString(stop) }
        return Completion(
            text: page.text, ids: page.ids, promptTokens: prompt.count, stopReason: reason,
            timings: Timings(
                prompt: prompt.count, written: page.ids.count, prefill: prefill, first: first,
                whole: clock.now - start))
    }

    private func end(
        _ written: Int, _ prompt: Int, _ stop: String?, _ options: GenerationOptions
    ) -> StopReason? {
        if let stop { return .stopString(stop) }
        if written >= options.maxTokens ?? GenerationOptions.usualMaxTokens { return .maxTokens }
        return prompt + written >= backend.facts.contextLength ? .contextFull : nil
    }

    private func check(_ logits: [Float]) throws(Phi3Error) {
        if logits.count != backend.facts.vocabularyRows {
            throw .generation(
                ErrorDetails(
                    place: "the model's logits", found: "\(logits.count) of them",
                    expected: "\(backend.facts.vocabularyRows)",
                    advice: "Export the model again."))
        }
    }

    /// Checks a prompt before anything is computed.
    ///
    /// - Throws: `Phi3Error.input` for no ids or ids the model does not have, `.contextOverflow` for
    ///   more than leave room for one token.
    func checkPrompt(_ ids: [Int32]) throws(Phi3Error) {
        let facts = backend.facts
        func refused(_ found: String, _ expected: String) -> Phi3Error {
            .input(
                ErrorDetails(
                    place: "the prompt", found: found, expected: expected,
                    advice: "Encode the text with the model's own tokenizer."))
        }
        if ids.isEmpty { throw refused("no tokens", "at least one") }
        if let wrong = ids.first(where: { $0 < 0 || Int($0) >= facts.vocabularyRows }) {
            throw refused("id \(wrong)", "ids from 0 to \(facts.vocabularyRows - 1)")
        }
        if ids.count >= facts.contextLength {
            throw .contextOverflow(
                ErrorDetails(
                    place: "the prompt", found: "\(ids.count) tokens",
                    expected: "fewer than the context's \(facts.contextLength)",
                    advice: "Shorten it, or export the model with a longer context."))
        }
    }
}
