//! A workload in Rust with the spiffe crates. It prints a line of JSON for each X509-SVID it is given and for
//! each command on standard input: "jwt AUDIENCE", or "call HOST:PORT SPIFFE-ID", which is mTLS.
use spiffe::{JwtSource, X509Source};
use spiffe_rustls::{authorizer, mtls_client};
use std::{error::Error, sync::Arc};
use tokio::io::{AsyncBufReadExt, BufReader};

fn show(source: &X509Source) -> Result<(), Box<dyn Error>> {
    let svid = source.svid()?;
    let (_, leaf) = x509_parser::parse_x509_certificate(svid.cert_chain()[0].as_bytes())?;
    println!("{{\"x509\":\"{}\",\"serial\":\"{}\"}}", svid.spiffe_id(), leaf.serial);
    Ok(())
}

async fn call(source: &X509Source, address: &str, id: &str) -> Result<String, Box<dyn Error>> {
    let config = mtls_client(source.clone()).authorize(authorizer::exact([id])?).build()?;
    let plain = tokio::net::TcpStream::connect(address).await?;
    let name = rustls::pki_types::ServerName::try_from("example.org")?;
    let conn = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, plain).await?;
    let mut line = String::new();
    BufReader::new(conn).read_line(&mut line).await?;
    Ok(line.trim().to_string())
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let source = X509Source::new().await?;
    let tokens = JwtSource::new().await?;
    let mut updates = source.updated();
    show(&source)?;
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    loop {
        tokio::select! {
            changed = updates.changed() => {
                changed?;
                if let Err(e) = show(&source) {
                    println!("{{\"error\":\"{}\"}}", e.to_string().replace('"', "'"));
                }
            }
            line = lines.next_line() => {
                let Some(line) = line? else { return Ok(()) };
                let words: Vec<&str> = line.split_whitespace().collect();
                let done = match words[0] {
                    "jwt" => tokens.fetch_jwt_svid([words[1]]).await.map(|t| format!("\"jwt\":\"{}\"", t.token())).map_err(Into::into),
                    _ => call(&source, words[1], words[2]).await.map(|heard| format!("\"heard\":\"{heard}\"")),
                };
                println!("{{{}}}", done.unwrap_or_else(|e: Box<dyn Error>| format!("\"error\":\"{}\"", format!("{e:?}").replace(['"', '\\'], "'"))));
            }
        }
    }
}
