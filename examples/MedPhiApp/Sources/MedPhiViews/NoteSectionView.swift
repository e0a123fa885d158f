#if canImport(SwiftUI)
    import MedPhiSession
    import SwiftUI

    #if canImport(UIKit)
        import UIKit
    #elseif canImport(AppKit)
        import AppKit
    #endif

    /// The note as it comes, for reading, correcting and copying.
    struct NoteSectionView: View {
        @Bindable var session: NoteSession

        var body: some View {
            Section("Draft of the note") {
                if let leftOut = session.leftOut {
                    Label(leftOut, systemImage: "exclamationmark.triangle")
                }
                TextEditor(text: $session.note)
                    .frame(minHeight: 160)
                    .disabled(session.phase == .writing)
                    .accessibilityLabel("The draft of the note, to be corrected")
                if session.phase == .writing { ProgressView() }
                if let figures = session.figures {
                    if let ending = figures.ending {
                        Label(ending, systemImage: "scissors")
                    }
                    Text(figures.line).font(.footnote).foregroundStyle(.secondary)
                }
                Toggle(Wording.checked, isOn: $session.isChecked)
                    .disabled(!session.canCopy)
                Button("Copy") { Pasteboard.put(session.copied) }
                    .disabled(!session.canCopy)
            }
        }
    }

    /// Where copied text goes.
    @MainActor private enum Pasteboard {
        static func put(_ text: String) {
            #if canImport(UIKit)
                UIPasteboard.general.string = text
            #elseif canImport(AppKit)
                NSPasteboard.general.clearContents()
                NSPasteboard.general.setString(text, forType: .string)
            #endif
        }
    }
#endif
