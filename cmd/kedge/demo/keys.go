package demo

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"kedge/sync/fleet"
)

// gatedRollout is the rollout of the releases that keys push: one node first, the others after promote.
const gatedRollout = "rollout: {canary: 1, bake: 3s, approval: manual, max_unavailable: 1}\n"

// key is a key that may be typed while the demo is shown.
type key struct {
	char  byte
	about string
	do    func() (shown string, err error) // shown is the command that do runs, and the command's output if there is any
}

func (d *Demo) keys() []key {
	release := func(version string) func() (string, error) {
		return func() (string, error) {
			d.rollout = gatedRollout
			return "git commit -am 'app " + version + "' && git push", d.push(version)
		}
	}
	unit := demoUnit.String()
	kedge := func(args ...string) func() (string, error) {
		return func() (string, error) { return d.kedge(args...) }
	}
	return []key{
		{'n', "push " + secondVersion + ": one node goes first", release(secondVersion)},
		{'b', "push " + brokenVersion + ", whose check fails", release(brokenVersion)},
		{'g', "go on: kedge promote", kedge("promote", unit)},
		{'p', "kedge pin " + firstVersion, kedge("pin", unit, firstVersion, "--reason", "demo")},
		{'u', "kedge unpin", kedge("unpin", unit)},
		{'+', "a fourth node boots", func() (string, error) {
			if d.agents()["web-4"] != nil {
				return "web-4 runs already", nil
			}
			return "kedge agent --node web-4 --stage prod --roles web", d.startNode("web-4")
		}},
	}
}

// kedge runs this program with the demo's store, and returns the command line and its output, whatever the exit code.
func (d *Demo) kedge(args ...string) (string, error) {
	c := exec.CommandContext(d.ctx, d.program, append(args, "--kv", d.kv())...)
	out, err := c.CombinedOutput()
	shown := "kedge " + strings.Join(args, " ") + "\n" + strings.TrimSpace(string(out))
	if _, failed := err.(*exec.ExitError); failed {
		err = nil // the output says why
	}
	return shown, err
}

// readKeys runs the command for each key that is typed, one after the other, until the demo ends. The key q ends the
// demo. The result of the last command is shown.
func (d *Demo) readKeys(in io.Reader) {
	keys := d.keys()
	for typed := make([]byte, 1); d.ctx.Err() == nil; {
		if _, err := in.Read(typed); err != nil {
			return
		}
		if typed[0] == 'q' {
			d.stop()
			return
		}
		for _, k := range keys {
			if k.char != typed[0] {
				continue
			}
			d.setLastOutput("… " + k.about)
			shown, err := k.do()
			if err != nil {
				shown = strings.TrimSpace(shown + "\n" + err.Error())
			}
			d.setLastOutput("$ " + shown)
		}
	}
}

func (d *Demo) setLastOutput(text string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.lastOutput = text
}

// readKeysRaw makes the terminal deliver each key at once and without echo; Ctrl-C still works.
// restore puts the terminal back. ok is false, and restore nil, if the terminal can't be changed,
// or if there is no terminal to type on or to show the fleet on.
func (d *Demo) readKeysRaw() (restore func(), ok bool) {
	f, isFile := d.In.(*os.File)
	if d.Screen == nil || !isFile || !term.IsTerminal(int(f.Fd())) {
		return nil, false
	}
	fd := int(f.Fd())
	was, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return nil, false
	}
	now := *was
	now.Lflag &^= unix.ICANON | unix.ECHO
	now.Cc[unix.VMIN], now.Cc[unix.VTIME] = 1, 0
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, &now); err != nil {
		return nil, false
	}
	return func() { unix.IoctlSetTermios(fd, unix.TCSETS, was) }, true
}

// screenLines is how many of a screen's 24 lines the demo uses.
const screenLines = 22

// draw shows the fleet, the keys, and the last command's output, as far as they fit into 24 lines of 80 columns.
func (d *Demo) draw(w io.Writer, f *fleet.Fleet, opt fleet.TableOptions) {
	var table, b strings.Builder
	fleet.WriteTable(&table, f, opt)
	if others := 9; strings.Count(table.String(), "\n") > screenLines-others { // converged nodes are left out then
		opt.AllNodes = false
		table.Reset()
		fleet.WriteTable(&table, f, opt)
	}
	fmt.Fprintf(&b, "kedge demo: a mirror and %d agents in %s\n\n", len(d.agents()), d.dir)
	b.WriteString(table.String())
	b.WriteByte('\n')
	for i, k := range d.keys() {
		entry := fmt.Sprintf("%c  %s", k.char, k.about)
		if i%2 == 0 {
			entry = fmt.Sprintf("  %-38s", entry)
		} else {
			entry += "\n"
		}
		b.WriteString(entry)
	}
	fmt.Fprintf(&b, "\nBrowser  http://%s/    q ends the demo\n", d.web.Addr())
	fmt.Fprintf(&b, "Shell    . %s   then: kedge explain web-1/app\n", filepath.Join(d.dir, "env"))
	d.mu.Lock()
	output := d.lastOutput
	d.mu.Unlock()
	if room := screenLines - 1 - strings.Count(b.String(), "\n"); output != "" && room > 0 {
		lines := strings.Split(output, "\n")
		b.WriteByte('\n')
		for _, line := range lines[:min(len(lines), room)] {
			b.WriteString(fleet.Clean(line, opt.Width) + "\n")
		}
	}
	io.WriteString(w, b.String())
}

// writeEnv writes the file that a second shell sources to use the demo.
func (d *Demo) writeEnv() error {
	text := fmt.Sprintf("export KEDGE_KV=%s PATH=%s:$PATH\ncd %s\n", d.kv(), d.dir, filepath.Join(d.dir, "deployments"))
	return os.WriteFile(filepath.Join(d.dir, "env"), []byte(text), 0o644)
}
