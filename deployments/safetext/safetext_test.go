package safetext

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"runtime"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"kedge/deployments/fuzzlimit"
)

func TestURLs(t *testing.T) {
	t.Parallel()
	digest := strings.Repeat("0a", 32)
	for text, want := range map[string]string{
		"no URL: a@b?token=c":                                     "no URL: a@b?token=c",
		"get https://user:pass@h.example/x: no":                   "get https://…@h.example/x: no",
		`Get "https://u:p@a@h/x?X-Amz-Signature=ab&list=2": EOF`:  `Get "https://…@h/x?X-Amz-Signature=…&list=2": EOF`,
		"two: http://a/?page=2&access_token=x and s3://b/k?sig=y": "two: http://a/?page=2&access_token=… and s3://b/k?sig=…",
		"https://h/x?X%2DAmz%2DSignature=ab":                      "https://h/x?X%2DAmz%2DSignature=…",
		"https://h?token=a@b/c":                                   "https://h?token=…",
		"s3://b/k?sig=y@sha256:" + digest:                         "s3://b/k?sig=…@sha256:" + digest,
		"s3://b/k?sig=y@sha256:0" + digest:                        "s3://b/k?sig=…",
		"ends in ://":                                             "ends in ://",
		"https://h/x#access_token=ab&b=c":                         "https://h/x#access_token=…&b=c",
		"https://h/x?a=b;c=d#sig=e":                               "https://h/x?a=b;c=d#sig=…",
		"https://h/x?sig=a#b&c=d":                                 "https://h/x?sig=…&c=d",
		"https://h/x?a#key=b":                                     "https://h/x?a#key=…",
		"in no URL: http://h:80/a@b and http://[::1]:x/a@b":       "in no URL: http://h:80/a@b and http://[::1]:x/a@b",
		"http://$HOST:$PORT/x":                                    "http://$HOST:$PORT/x",
		"git@h.example:a/b, s3://b/k@sha256:" + digest:            "git@h.example:a/b, s3://b/k@sha256:" + digest,
	} {
		if got := URLs(text); got != want {
			t.Errorf("%q gives %q, want %q", text, got, want)
		}
	}
}

// What one report says hides nothing of what stands beside it.
func TestURLsInMarkup(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		`<td>http://a:b c</td><td>ada@h.example</td>`: `<td>http://a:b c</td><td>ada@h.example</td>`,
		`["http://a:b","ada@h.example"]`:              `["http://a:b","ada@h.example"]`,
		`["parse \"","x: invalid port y after host"]`: `["parse \"","x: invalid port y after host"]`,
		`<td>https://u:a/b@h/x</td>`:                  `<td>https://…@h/x</td>`,
		`["http:/u:a/b@h/x","https://u:p@h?sig=c"]`:   `["http:/…@h/x","https://…@h?sig=…"]`,
	} {
		if got := URLsInMarkup(text); got != want {
			t.Errorf("%s gives %s, want %s", text, got, want)
		}
	}
}

// A password may have any character, and whoever types it may forget to escape it, or a part of ://.
func TestURLsThatDoNotParse(t *testing.T) {
	t.Parallel()
	digest := "@sha256:" + strings.Repeat("0a", 32)
	odds := []string{"/", "?", "#", "%", " ", `"`, "'", "<", "|", "\\", "@", ":", "%40", "[", "=", "&", ";", "é"}
	for _, odd := range odds {
		for _, form := range []string{
			"https://u:PASS@h/x", "HTTPS://u:PASS@h:8443/x?y=z", "htps://u:PASS@h", "ssh://u:PASS@h/x" + digest,
			"https://u:PASS%40h/x", "https://u:PASS@h/m.yaml@sha256:0a0a...",
		} {
			address := strings.Replace(form, "PASS", "half"+odd+"part", 1)
			_, parsed := url.Parse(address)
			for _, text := range []string{
				address, "got " + address, fmt.Sprintf("repository %q: no", address), fmt.Sprint("no: ", parsed),
				fmt.Sprintf("%q", fmt.Sprint("no: ", parsed)),
			} {
				got := URLs(text)
				if strings.Contains(got, "half") || strings.Contains(got, "part") || strings.Contains(got, "……") {
					t.Errorf("%s gives %s", text, got)
				}
				if again := URLs(got); again != got {
					t.Errorf("%s gives %s, and once more %s", text, got, again)
				}
			}
		}
	}
	for _, form := range []string{
		"http:/u:half/part@h", "http//u:half/part@h", "https:u:half?part@h", "ssh/u:half/part@h",
	} {
		if got := URLs("got " + form + digest); strings.Contains(got, "half") || strings.Contains(got, "part") ||
			!strings.HasSuffix(got, "@h"+digest) {
			t.Errorf("%s gives %s", form, got)
		}
	}
}

func TestPrintable(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"plain, ü and 漢\n\tkept": "plain, ü and 漢\n\tkept", "\x1b[31mred\x07": "\ufffd[31mred\ufffd", "a\u202eb\u200bc\u2066": "a\ufffdb\ufffdc\ufffd",
		"\x9b1m\u009b\xff\r": "\ufffd1m\ufffd\ufffd\ufffd",
	} {
		if got := Printable(text); got != want || !utf8.ValidString(got) {
			t.Errorf("%q gives %q, want %q", text, got, want)
		}
	}
}

func TestLine(t *testing.T) {
	t.Parallel()
	for s, want := range map[string]string{
		"as it is":              "as it is",
		"two\nlines\x1b[1m\x7f": "two lines [1m ",
		"caf\xe9":               "caf?",
		strings.Repeat("é", 20): strings.Repeat("é", 8) + "...",
		strings.Repeat("x", 20): strings.Repeat("x", 20),
		strings.Repeat("x", 21): strings.Repeat("x", 17) + "...",
	} {
		if got := Line(s, 20); got != want {
			t.Errorf("%q: %q, want %q", s, got, want)
		}
	}
}

func TestCut(t *testing.T) {
	t.Parallel()
	for s, want := range map[string]string{
		strings.Repeat("é", 10):        strings.Repeat("é", 10),
		strings.Repeat("é", 11):        strings.Repeat("é", 8) + "...",
		"\n" + strings.Repeat("x", 20): "\n" + strings.Repeat("x", 16) + "...",
	} {
		if got := Cut(s, 20); got != want || len(got) > 20 {
			t.Errorf("%q: %q, want %q", s, got, want)
		}
	}
}

func TestPrefix(t *testing.T) {
	t.Parallel()
	for s, want := range map[string]string{"é": "é", "éé": "éé", "ééé": "éé", "xéé": "xé", "xy\xffz!": "xyz"} {
		if got := Prefix(s, 4); got != want {
			t.Errorf("%q: %q, want %q", s, got, want)
		}
	}
}

func TestJSON(t *testing.T) {
	t.Parallel()
	in := map[string]string{"a\u202e": "b\u009b\U000E0041 ü 漢 \u2028 \x7f \x1b"}
	data, err := json.Marshal(in)
	if err != nil {
		t.Fatal(err)
	}
	safe := JSON(data)
	if i := bytes.IndexFunc(safe, isInvisible); i >= 0 {
		t.Errorf("%q has %q", safe, safe[i:])
	}
	var out map[string]string
	if err := json.Unmarshal(safe, &out); err != nil || out["a\u202e"] != in["a\u202e"] {
		t.Errorf("%s is %q, %v", safe, out, err)
	}
}

// Whatever is logged, a line is bounded, has no secret of a URL, and nothing that a terminal would obey.
func TestHandler(t *testing.T) {
	t.Parallel()
	var b bytes.Buffer
	hostile := strings.Repeat("x", 1<<20) + "\u202e\x1b[2J"
	for _, next := range []slog.Handler{slog.NewJSONHandler(&b, nil), slog.NewTextHandler(&b, nil)} {
		b.Reset()
		log := slog.New(NewHandler(next)).With("with", "\u202e https://u:s3cret@h/").WithGroup("g")
		log.Info("\u202e", "text", hostile, "error", errors.New("get https://h/x?X-Amz-Signature=s3cret\u009b"+hostile), "took", 3*time.Second, "n", 7,
			"list", []string{"https://u:s3cret@h/", hostile}, slog.Group("h", "bytes", bytes.NewBufferString(hostile)))
		line := b.String()
		if len(line) > 8*MaxValue || strings.Contains(line, "s3cret") ||
			bytes.IndexFunc(b.Bytes()[:b.Len()-1], isInvisible) >= 0 {
			t.Errorf("%d bytes: %.300q", len(line), line)
		}
		for _, want := range []string{"more bytes]", "X-Amz-Signature=…", "https://…@h/"} {
			if !strings.Contains(line, want) {
				t.Errorf("%q is not in the line", want)
			}
		}
	}
}

// A value is cut, says how much was, and costs no more to be cut if it is large.
func TestCleanIsBounded(t *testing.T) {
	t.Parallel()
	for _, n := range []int{MaxValue, MaxValue + 1, 2 * MaxValue, 2*MaxValue + 1, 1 << 20} {
		want := strings.Repeat("x", MaxValue)
		if n > MaxValue {
			want += fmt.Sprintf("… [%d more bytes]", n-MaxValue)
		}
		if got := Clean(strings.Repeat("x", n)); got != want {
			t.Errorf("%d bytes become %d: …%s", n, len(got), got[len(got)-30:])
		}
	}
	if got := Clean(strings.Repeat("x", MaxValue-1) + "äö"); got != strings.Repeat("x", MaxValue-1)+"… [4 more bytes]" {
		t.Errorf("a character is cut: …%q", got[len(got)-30:])
	}
	large := strings.Repeat("\u202e https://u:s3cret@h/ ", 2<<20)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	Clean(large)
	runtime.ReadMemStats(&after)
	if took := after.TotalAlloc - before.TotalAlloc; took > uint64(len(large)) {
		t.Errorf("%d MiB take %d MiB", len(large)>>20, took>>20)
	}
}

func FuzzClean(f *testing.F) {
	f.Add("get https://u:p@h/x?sig=1 \u202e\x1b")
	f.Fuzz(func(t *testing.T, s string) {
		var clean string
		fuzzlimit.Run(t, s, func() { clean = Clean(s) })
		if len(clean) > MaxValue+64 || strings.IndexFunc(clean, hostile) >= 0 || !utf8.ValidString(clean) {
			t.Errorf("%q gives %q", s, clean)
		}
	})
}
