package git

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kedge/sync/git/gittest"
)

// The mirror makes an installation token by the app's key, fetches with it, makes the next one before it expires,
// and a new one if it is refused.
func TestGitHubApp(t *testing.T) {
	t.Parallel()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	keyFile := filepath.Join(t.TempDir(), "app.pem")
	gittest.WriteFile(t, keyFile, string(pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY",
		Bytes: x509.MarshalPKCS1PrivateKey(key)})))
	h := gittest.ServeHTTPS(t, gittest.New(t))
	made, good, life := 0, "", time.Hour
	front(h, func(w http.ResponseWriter, r *http.Request, asked []byte) bool {
		if r.URL.Path != "/api/v3/app/installations/42/access_tokens" {
			if user, password, _ := r.BasicAuth(); user == "x-access-token" && password == good {
				r.SetBasicAuth("mirror", "s3cret")
			}
			return false
		}
		issuer, err := checkJWT(&key.PublicKey, strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer "))
		if err != nil || issuer != "Iv1.app" || r.Method != http.MethodPost || !strings.Contains(string(asked),
			`"contents":"read"`) {
			http.Error(w, fmt.Sprintf(`{"message":"A JSON web token could not be decoded: %v"}`, err), http.StatusUnauthorized)
			return true
		}
		made++
		good = fmt.Sprint("ghs_", made)
		w.WriteHeader(http.StatusCreated)
		fmt.Fprintf(w, `{"token":%q,"expires_at":%q,"permissions":{"contents":"read"}}`, good,
			time.Now().Add(life).UTC().Format(time.RFC3339))
		return true
	})
	base, _, _ := strings.Cut(h.URL, "/deployments")
	b := openBranch(t, Config{Repo: h.URL, Branch: "main", Env: env("GIT_SSL_CAINFO", h.CAFile,
		"KEDGE_GITHUB_APP_ID", "Iv1.app",
		"KEDGE_GITHUB_APP_INSTALLATION", "42", "KEDGE_GITHUB_APP_KEY_FILE", keyFile, "KEDGE_GITHUB_API", base+"/api/v3/")})
	tokens := func(want int, what string) {
		t.Helper()
		if made != want {
			t.Errorf("%s: %d tokens were made, want %d", what, made, want)
		}
	}
	reads(t, b, h.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")}))
	head := h.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2")})
	reads(t, b, head)
	tokens(1, "two fetches")
	good = "revoked"
	fails(t, b, "a token that was revoked", "401")
	reads(t, b, head)
	tokens(2, "after it was revoked")
	good, life = "revoked", 4*time.Minute
	fails(t, b, "a token that was revoked", "401")
	reads(t, b, head)
	life = time.Hour
	short := made
	reads(t, b, head)
	reads(t, b, head)
	tokens(short+1, "a token that is about to end")

	other, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	gittest.WriteFile(t, keyFile, string(pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY",
		Bytes: x509.MarshalPKCS1PrivateKey(other)})))
	good = "revoked"
	fails(t, b, "a token that was revoked", "401")
	fails(t, b, "another key", "requesting a token for GitHub App Iv1.app", "could not be decoded")
	gittest.WriteFile(t, keyFile, "no key")
	fails(t, b, "a file without a key", "KEDGE_GITHUB_APP_KEY_FILE")
	half := openBranch(t, Config{Repo: h.URL, Branch: "main", Env: env("GIT_SSL_CAINFO", h.CAFile,
		"KEDGE_GITHUB_APP_ID", "1")})
	fails(t, half, "half a configuration", "KEDGE_GITHUB_APP_INSTALLATION")
}

// checkJWT checks RS256, as GitHub does, and returns the issuer.
func checkJWT(key *rsa.PublicKey, jwt string) (string, error) {
	parts := strings.Split(jwt, ".")
	if len(parts) != 3 {
		return "", fmt.Errorf("%d parts", len(parts))
	}
	signature, err := base64.RawURLEncoding.DecodeString(parts[2])
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256([]byte(parts[0] + "." + parts[1]))
	if err := rsa.VerifyPKCS1v15(key, crypto.SHA256, sum[:], signature); err != nil {
		return "", err
	}
	text, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return "", err
	}
	var claims struct {
		Issuer   string `json:"iss"`
		From, To int64
	}
	err = json.Unmarshal([]byte(strings.NewReplacer(`"iat"`, `"From"`, `"exp"`, `"To"`).Replace(string(text))), &claims)
	if now := time.Now().Unix(); err == nil && (claims.From > now || claims.To <= now || claims.To-claims.From > 600) {
		err = fmt.Errorf("from %d to %d", claims.From, claims.To)
	}
	return claims.Issuer, err
}
