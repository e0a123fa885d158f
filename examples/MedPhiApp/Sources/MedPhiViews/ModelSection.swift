#if canImport(SwiftUI)
    import MedPhiSession
    import SwiftUI
    import UniformTypeIdentifiers

    /// Which model is open, what it is, and what is on it.
    struct ModelSection: View {
        @Bindable var session: NoteSession
        @State private var picksModel = false
        @State private var picksAdapter = false

        var body: some View {
            Section("Model") {
                if let card = session.card {
                    LabeledContent("Name", value: card.name)
                    ForEach(card.rows) { row in LabeledContent(row.title, value: row.value) }
                    if let warning = card.warning {
                        Label(warning, systemImage: "exclamationmark.triangle")
                    }
                    adapterPicker
                } else {
                    Text(Wording.noModel)
                }
                if case .opening(let event) = session.phase {
                    ProgressView(Wording.opening(event))
                }
                buttons
            }
        }

        private var adapterPicker: some View {
            Picker("Adapter", selection: $session.adapter) {
                ForEach(session.adapters) { choice in Text(choice.title).tag(choice) }
            }
            .disabled(session.phase != .ready)
        }

        private var buttons: some View {
            HStack {
                Button("Open a model…") { picksModel = true }
                    .disabled(session.phase == .writing)
                    .fileImporter(
                        isPresented: $picksModel, allowedContentTypes: [.folder, .data]
                    ) { result in
                        switch result {
                        case .success(let url): Task { await session.open(url) }
                        case .failure(let error): session.fail(error)
                        }
                    }
                Button("Add an adapter…") { picksAdapter = true }
                    .disabled(session.phase != .ready)
                    .fileImporter(
                        isPresented: $picksAdapter, allowedContentTypes: [.folder, .data]
                    ) { result in
                        switch result {
                        case .success(let url): Task { await session.addAdapter(url) }
                        case .failure(let error): session.fail(error)
                        }
                    }
            }
            // In a form on iOS, a tap on a row presses all of its plain buttons.
            .buttonStyle(.borderless)
        }
    }
#endif
