#if canImport(SwiftUI)
    import MedPhiSession
    import MedPhiViews
    import SwiftUI
    #if canImport(AppKit)
        import AppKit
    #endif

    /// A conversation in, a note out, on this device.
    @main struct MedPhiApp: App {
        @State private var session = NoteSession()

        init() {
            #if canImport(AppKit)
                // Started from a package there is no app bundle that would ask for a window.
                NSApplication.shared.setActivationPolicy(.regular)
                NSApplication.shared.activate()
            #endif
        }

        var body: some Scene {
            WindowGroup("MedPhi") { NoteScreen(session: session) }
        }
    }
#else
    /// Elsewhere there is no SwiftUI; the session behind the screen is built and tested all the same.
    @main struct MedPhiApp {
        static func main() { print("MedPhiApp needs SwiftUI: macOS 15 or iOS 18.") }
    }
#endif
