package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// terminalFor runs kedge on a terminal of 80x24, and gives what it shows now.
type terminalFor struct {
	master *os.File
	cmd    *exec.Cmd

	mu   sync.Mutex
	text string
}

// openTerminal opens a terminal of 80x24 characters: what programs have of it, slave, and what its user has, master.
func openTerminal(t *testing.T) (master, slave *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { master.Close() })
	fd := int(master.Fd())
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	}
	if err == nil {
		err = unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: 80})
	}
	if err != nil {
		t.Fatal(err)
	}
	slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { slave.Close() })
	return master, slave
}

func startOnTerminal(t *testing.T, args ...string) *terminalFor {
	t.Helper()
	master, slave := openTerminal(t)
	defer slave.Close()
	s := &terminalFor{master: master, cmd: exec.Command(testedProgram(t), args...)}
	s.cmd.Env = append(baseEnv(), "TERM=xterm")
	s.cmd.Env = append(s.cmd.Env, "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_SYSTEM=/dev/null")
	s.cmd.Stdin, s.cmd.Stdout, s.cmd.Stderr = slave, slave, slave
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		b := make([]byte, 64<<10)
		for {
			n, err := master.Read(b)
			if err != nil {
				return
			}
			s.mu.Lock()
			s.text += string(b[:n])
			s.mu.Unlock()
		}
	}()
	return s
}

// frames are the screens that were drawn, without styles.
func (s *terminalFor) frames() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	text := strings.ReplaceAll(style.ReplaceAllString(s.text, ""), "\r\n", "\n")
	text = strings.NewReplacer("\x1b[K", "", "\x1b[2J", "", "\x1b[J", "\x00").Replace(text)
	return strings.Split(text, "\x1b[H")
}

// The demo fits a terminal of 80x24, and goes by keys: a release stops at its canary, a promote lets it go on, a pin
// takes all back.
func TestDemoTakesKeys(t *testing.T) {
	t.Parallel()
	s := startOnTerminal(t, "demo")
	ended := make(chan error, 1)
	shows := func(what string, pattern string) {
		t.Helper()
		want := regexp.MustCompile(`(?s)` + pattern)
		await(t, what, func() error {
			frames := s.frames()
			for i := len(frames) - 1; i >= 0; i-- {
				if frame, whole := strings.CutSuffix(strings.TrimRight(frames[i], "\n"), "\x00"); whole {
					if want.MatchString(frame) {
						return nil
					}
					return fmt.Errorf("the screen is\n%s", frame)
				}
			}
			return fmt.Errorf("no screen yet")
		})
	}
	press := func(key string) {
		if _, err := s.master.WriteString(key); err != nil {
			t.Fatal(err)
		}
	}
	shows("the first release", `1\.0\.0 on 3`)
	press("n")
	shows("a canary that waits", `1\.1\.0 on 1.*pending-approval|pending-approval.*1\.1\.0 on 1`)
	press("g")
	shows("the rest", `1\.1\.0 on 3`)
	shows("the command", `\$ kedge promote prod/web/app\n`)
	press("p")
	shows("a pin", `1\.0\.0 on 3.*\$ kedge pin prod/web/app 1\.0\.0`)
	press("u")
	shows("no pin", `1\.1\.0 on 3.*\$ kedge unpin`)
	press("+")
	shows("another node", `1\.1\.0 on 4`)
	press("b")
	shows("a release that failed", `rolled-back`)
	dir := regexp.MustCompile(`/\S*kedge-demo-\d+`).FindString(strings.Join(s.frames(), ""))
	press("q")
	go func() { ended <- s.cmd.Wait() }()
	if err := <-ended; err != nil {
		t.Errorf("it ends with %v", err)
	}
	if _, err := os.Stat(dir); dir == "" || !os.IsNotExist(err) {
		t.Errorf("%q is left behind: %v", dir, err)
	}
	for _, frame := range s.frames()[1:] {
		frame, _, _ = strings.Cut(frame, "\x00")
		if n := strings.Count(frame, "\n"); n > 23 || strings.Contains(frame, "more line") {
			t.Errorf("a screen of %d lines:\n%s", n, frame)
		}
		for line := range strings.Lines(frame) {
			if n := utf8.RuneCountInString(strings.TrimRight(line, "\n")); n > 80 {
				t.Errorf("a line of %d columns: %s", n, line)
			}
		}
	}
}

// The demo walks through a day by itself, every step with its time, and keeps the directory that it was given.
func TestDemoWalks(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "demo")
	c := exec.Command(testedProgram(t), "demo", "--once", "--dir", dir)
	c.Env = append(baseEnv(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_SYSTEM=/dev/null")
	out, err := c.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	steps := []string{"all three nodes are live", "all three switched", "unpin", "goes back to 1.1.0", "converged"}
	for _, step := range steps {
		if !strings.Contains(string(out), step) {
			t.Errorf("it doesn't say %q:\n%s", step, out)
		}
	}
	live, err := os.ReadFile(filepath.Join(dir, "nodes/web-4/srv/app/VERSION"))
	if err != nil || string(live) != "1.1.0\n" {
		t.Errorf("the late node serves %q, %v", live, err)
	}
	_, says, code := cli(t, "", "demo", "--once", "--dir", dir)
	if code != exitFailed || !strings.Contains(says, "is not empty") {
		t.Errorf("a directory in use: exit %d, %s", code, says)
	}
}

// A real bash completes units and flags' values from what the store has.
func TestCompletionInBash(t *testing.T) {
	t.Parallel()
	bash, err := exec.LookPath("bash")
	if err != nil {
		if testing.Short() {
			t.Skip("needs bash")
		}
		t.Fatal(err)
	}
	store, _ := operateStore(t)
	bin := t.TempDir()
	if err := os.Symlink(testedProgram(t), bin+"/kedge"); err != nil {
		t.Fatal(err)
	}
	script, _, _ := cli(t, "", "completion", "bash")
	for line, want := range map[string]string{
		"promote prod/":         "prod/web/app",
		"node web-":             "web-1 web-2",
		"pin prod/web/app 1.0":  "1.0.0",
		"status --log-level wa": "warn",
		"schema kedge":          "kedge.yaml",
	} {
		words := strings.Split("kedge "+line, " ")
		// What the package bash-completion brings, in short.
		lib := "_get_comp_words_by_ref() { words=(\"${COMP_WORDS[@]}\"); cword=$COMP_CWORD; cur=${COMP_WORDS[COMP_CWORD]}; " +
			"prev=${COMP_WORDS[COMP_CWORD-1]}; }\n__ltrim_colon_completions() { :; }\n"
		c := exec.Command(bash, "--norc", "-c", lib+script+fmt.Sprintf(
			"\nCOMP_WORDS=(%[1]s); COMP_CWORD=%[2]d; COMP_LINE='%[1]s'; COMP_POINT=${#COMP_LINE}; COMP_TYPE=9\n"+
				"__start_kedge; echo ${COMPREPLY[@]}", strings.Join(words, " "), len(words)-1))
		c.Env = append(baseEnv(), "PATH="+bin+":"+os.Getenv("PATH"))
		c.Env = append(c.Env, "KEDGE_KV="+strings.TrimPrefix(store, "--kv="))
		out, err := c.Output()
		if got := strings.TrimSpace(string(out)); err != nil || got != want {
			t.Errorf("%q completes to %q, want %q: %v", line, got, want, err)
		}
	}
}
