package web

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"

	"kedge/deployments"
)

// browser is a real Chromium with one tab.
type browser struct {
	t *testing.T
	context.Context
	axe string
	// wrong are errors that pages have logged.
	wrong chan string
}

// startBrowser starts one until the test ends.
func startBrowser(t *testing.T) *browser {
	t.Helper()
	if testing.Short() {
		t.Skip("needs Chromium")
	}
	path, err := exec.LookPath("chromium")
	if err != nil {
		t.Fatalf("%v: .ci/tools installs it", err)
	}
	axe, err := os.ReadFile(filepath.Join(tools(t), "axe.min.js"))
	if err != nil {
		t.Fatalf("%v: .ci/tools installs it", err)
	}
	options := append(chromedp.DefaultExecAllocatorOptions[:], chromedp.ExecPath(path), chromedp.NoSandbox,
		chromedp.Flag("hide-scrollbars", true), chromedp.UserDataDir(t.TempDir()))
	allocator, end := chromedp.NewExecAllocator(context.WithoutCancel(t.Context()), options...)
	t.Cleanup(end)
	ctx, endTab := chromedp.NewContext(allocator)
	t.Cleanup(endTab)
	b := &browser{t: t, Context: ctx, axe: string(axe), wrong: make(chan string, 100)}
	if err := chromedp.Listen(ctx, func(event any) {
		switch e := event.(type) {
		case *runtime.EventConsoleAPICalled:
			if e.Type == runtime.ConsoleAPICalledTypeError {
				b.wrong <- fmt.Sprint(string(e.Args[0].Value))
			}
		case *runtime.EventExceptionThrown:
			b.wrong <- e.ExceptionDetails.Text
		}
	}); err != nil {
		t.Fatal(err)
	}
	return b
}

// do runs actions in the tab.
func (b *browser) do(actions ...chromedp.Action[chromedp.Void]) {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b, time.Minute)
	defer cancel()
	if err := chromedp.Do(ctx, actions...); err != nil {
		b.t.Fatal(err)
	}
}

// eval is what a script gives in the page.
func eval[T any](b *browser, script string) T {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b, time.Minute)
	defer cancel()
	v, err := chromedp.Run(ctx, chromedp.Evaluate[T](script, chromedp.EvalAwaitPromise))
	if err != nil {
		b.t.Fatalf("%s: %v", script[:min(80, len(script))], err)
	}
	return v
}

// until waits until a condition holds in the page.
func (b *browser) until(condition string, within time.Duration) time.Duration {
	b.t.Helper()
	start := time.Now()
	for !eval[bool](b, condition) {
		if time.Since(start) > within {
			b.t.Fatalf("not within %s: %s", within, condition)
		}
		time.Sleep(50 * time.Millisecond)
	}
	return time.Since(start)
}

// size and scheme are what a page is looked at with.
var sizes = []struct {
	name          string
	width, height int64
}{{"phone", 390, 844}, {"tablet", 820, 1180}, {"desktop", 1440, 900}}

var schemes = []string{"light", "dark"}

func (b *browser) as(width, height int64, scheme string) {
	b.t.Helper()
	b.do(chromedp.EmulateViewport(width, height))
	ctx, cancel := context.WithTimeout(b, time.Minute)
	defer cancel()
	features := []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: scheme}}
	if _, err := chromedp.Call(ctx, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{Features: features}); err != nil {
		b.t.Fatal(err)
	}
}

// tabStops counts what the Tab key stops at.
const tabStops = `[...document.querySelectorAll("a[href], button, input, select, textarea, [tabindex]")]
	.filter((e) => e.tabIndex >= 0 && !e.disabled && e.checkVisibility()).length`

// violations are what axe finds against the rules of WCAG 2.2 AA and its own best practices.
func (b *browser) violations() []string {
	b.t.Helper()
	eval[any](b, b.axe+"; 1")
	found := eval[string](b, `axe.run(document, {resultTypes: ["violations"]}).then((r) => JSON.stringify(r.violations.map(
		(v) => v.id + ": " + v.help + ": " + v.nodes.slice(0, 3).map((n) => n.html.slice(0, 200)).join(" | "))))`)
	var all []string
	if err := json.Unmarshal([]byte(found), &all); err != nil {
		b.t.Fatal(err)
	}
	return all
}

// Each page, in each situation, at three sizes and in two schemes: nothing overflows, nothing is logged, axe finds nothing,
// and the Tab key gets through.
func TestPagesInABrowser(t *testing.T) {
	t.Parallel()
	b := startBrowser(t)
	shots := os.Getenv("KEDGE_SHOTS")
	for _, s := range []scene{
		smallScene(), bigScene(), appScene(10_000, deployments.PhaseRolling), appScene(40, deployments.PhaseRollingBack), awayScene(),
	} {
		server := httptest.NewServer(offline(t, s).handler())
		pages := map[string]string{"overview": "/", "unit": "/prod/web/app", "node": s.node, "overrides": "/-/overrides"}
		for name, path := range pages {
			if path == "" {
				continue
			}
			for i, size := range sizes {
				for j, scheme := range schemes {
					b.as(size.width, size.height, scheme)
					if i+j == 0 {
						b.do(chromedp.Navigate(server.URL + path))
					}
					b.until(`document.readyState === "complete"`, 10*time.Second)
					if s.trouble != "" { // a page that follows a store that is away isn't live
						b.until(`document.getElementById("live").textContent === "not up to date"`, 30*time.Second)
					}
					what := fmt.Sprintf("%s-%s-%s-%s", s.name, name, size.name, scheme)
					if over := eval[int](b, `document.documentElement.scrollWidth - innerWidth`); over > 0 {
						t.Errorf("%s is %d pixels too wide", what, over)
					}
					if stops := eval[int](b, tabStops); stops > 200 {
						t.Errorf("%s has %d tab stops", what, stops)
					}
					if i != 1 {
						for _, v := range b.violations() {
							t.Errorf("%s: %s", what, v)
						}
					}
					if shots != "" {
						b.shoot(filepath.Join(shots, what+".png"))
					}
				}
			}
		}
		b.do(chromedp.Navigate("about:blank"))
		server.CloseClientConnections()
		server.Close()
	}
	for {
		select {
		case text := <-b.wrong:
			if !strings.Contains(text, "ERR_") {
				t.Errorf("a page logs %s", text)
			}
			continue
		default:
		}
		break
	}
}

// shoot writes a picture of the whole page.
func (b *browser) shoot(path string) {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b, time.Minute)
	defer cancel()
	png, err := chromedp.Run(ctx, chromedp.FullScreenshot(100))
	if err == nil {
		err = os.WriteFile(path, png, 0o600)
	}
	if err != nil {
		b.t.Fatal(err)
	}
}
